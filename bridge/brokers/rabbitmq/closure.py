"""What ended a connection or a channel, or kept one from being opened, and which of our errors that is.

Everything in this folder that fails ends here: the sink, the queue, the dead letters and the topology say the same of
the same mistake. Each message begins with the key of a setting and names host and port; none holds the password.
"""

import shlex
import socket
import ssl
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

from bridge.brokers.rabbitmq.settings import Address, RabbitMQSettings
from bridge.brokers.tls import OTHER_NAME, OUT_OF_DATE, refuses_ours, trust_it
from bridge.errors import (
    BrokerUnavailableError,
    LoginError,
    PgbridgeError,
    PrivilegeError,
    RefusedError,
    TopologyError,
)


class Reply(IntEnum):
    """AMQP's reply codes, as far as we act on them."""

    CONTENT_TOO_LARGE = 311
    ACCESS_REFUSED = 403
    NOT_FOUND = 404
    RESOURCE_LOCKED = 405
    PRECONDITION_FAILED = 406
    FRAME_ERROR = 501
    SYNTAX_ERROR = 502
    COMMAND_INVALID = 503
    CHANNEL_ERROR = 504
    UNEXPECTED_FRAME = 505
    NOT_ALLOWED = 530
    NOT_IMPLEMENTED = 540
    INTERNAL_ERROR = 541


_BLAMES_CONTENT: Final = frozenset(
    {
        Reply.CONTENT_TOO_LARGE,
        Reply.PRECONDITION_FAILED,
        Reply.FRAME_ERROR,
        Reply.SYNTAX_ERROR,
        Reply.COMMAND_INVALID,
        Reply.CHANNEL_ERROR,
        Reply.UNEXPECTED_FRAME,
        Reply.NOT_IMPLEMENTED,
        # What handles the message crashed; in a broker with plugins, over a header that one of them reads. Trouble of
        # the broker itself shows when the sink is opened again, which asks for the exchange.
        Reply.INTERNAL_ERROR,
    }
)
"""Replies with which the broker ends a channel or connection over what was sent on it, and would again; not those that
name a missing exchange or permission, an operator's close, or a shortage."""


During = Literal["greeting", "login", "virtual host", "declaring", "use"]
"""What was going on: the three steps of the handshake, asking for or declaring an exchange, queue or binding, or
anything else. The same reply code means another thing in each."""

APPLY: Final = "declare it with `pgbridge topology --apply`"


@dataclass(frozen=True, slots=True)
class Closure:
    """Why a connection or channel ended."""

    reason: str
    code: int = 0
    """AMQP's reply code; 0 when the broker gave none."""
    said: str = ""
    """The broker's own words."""
    during: During = "use"
    cause: Exception | None = None
    """What the socket or TLS raised."""
    in_tls: bool = False
    """Whether the other side answered in TLS although we do not speak it."""

    @property
    def blames_content(self) -> bool:
        """Whether the broker ended it over something that was sent, once the handshake was done."""
        return self.during == "use" and self.code in _BLAMES_CONTENT

    def __str__(self) -> str:
        text = f"{self.reason}: {self.said}" if self.said else self.reason
        return f"{text} ({self.code})" if self.code else text


class ClosedError(Exception):
    """The connection or channel ended before the answer came."""

    def __init__(self, closure: Closure) -> None:
        super().__init__(str(closure))
        self.closure = closure


def rabbitmq_at(settings: RabbitMQSettings, field: str = "url", *, at: Address | None = None) -> str:
    """How a message about this broker begins; `field` is the setting to look at, `at` the one host that it is about."""
    return f"{settings.key(field)}: RabbitMQ at {at or ', '.join(map(str, settings.addresses))}"


def error_of(settings: RabbitMQSettings, closure: Closure, at: Address | None = None) -> PgbridgeError:
    """The error to raise for a closure; `at` is the host that it came from, where that is known."""
    broker, address = rabbitmq_at(settings, at=at), settings.login
    said = closure.said or closure.reason
    virtual_host = shlex.quote(address.virtual_host)
    permit = f"`rabbitmqctl set_permissions -p {virtual_host} {shlex.quote(address.user)} CONFIGURE WRITE READ`"
    match closure.during, closure.code:
        case (("greeting" | "login" | "virtual host"), _) if isinstance(closure.cause, ssl.SSLError):
            return connecting_failed(settings, closure.cause, at)
        case "greeting", _ if closure.in_tls:
            return RefusedError(
                f"{broker} speaks TLS, and the URL begins with amqp://; write amqps://, or the port without TLS "
                "(usually 5672)"
            )
        case "greeting", _:
            return BrokerUnavailableError(f"{broker} gives no greeting of AMQP 0-9-1: {closure}{_hint(settings)}")
        case "login", Reply.ACCESS_REFUSED:
            return LoginError(
                f"{broker} refuses the user {address.user!r} or its password: {said.rstrip('.')}; correct "
                "the URL, or the account with `rabbitmqctl add_user` or `change_password`"
            )
        case "virtual host", Reply.NOT_ALLOWED:
            return RefusedError(
                f"{broker} does not open the virtual host {address.virtual_host!r} to user {address.user!r}: {said}; "
                f"create it with `rabbitmqctl add_vhost {virtual_host}`, or grant access with {permit}"
            )
        case ("login" | "virtual host") as step, _:
            return BrokerUnavailableError(f"{broker} did not finish the step {step!r} of connecting: {closure}")
        case _, Reply.ACCESS_REFUSED:
            return PrivilegeError(
                f"{broker} does not permit this to user {address.user!r}: {said}; grant it with {permit}"
            )
        case _, Reply.NOT_FOUND:
            return TopologyError(f"{broker} lacks what these settings need: {said}; {APPLY}")
        # Outside of declaring, 406 says nothing about the topology: an acknowledgement came too late, for example.
        case "declaring", Reply.PRECONDITION_FAILED | Reply.RESOURCE_LOCKED:
            return TopologyError(f"{broker} has it with other properties: {said}; see `pgbridge topology`")
    return BrokerUnavailableError(f"{broker} ended the connection: {closure}")


def _hint(settings: RabbitMQSettings) -> str:
    if settings.login.tls:
        return f"; where it asks for a client certificate, name one in {settings.key('tls.cert_file')}"
    return "; at a port for TLS the URL begins with amqps://, not amqp://"


def connecting_failed(settings: RabbitMQSettings, error: OSError, at: Address | None = None) -> PgbridgeError:
    """The error to raise when the network or TLS kept a connection from being made."""
    broker, address = rabbitmq_at(settings, at=at), settings.login
    match error:
        case ssl.SSLCertVerificationError() if error.verify_code in OTHER_NAME:
            return RefusedError(
                f"{broker} shows a certificate for another name: {error.verify_message.rstrip('.')}; write a host "
                f"that it names ({settings.key('tls.ca_file')} says only who may sign it)"
            )
        case ssl.SSLCertVerificationError() if error.verify_code in OUT_OF_DATE:
            return RefusedError(
                f"{broker} shows a certificate that is out of date: {error.verify_message}. Renew it on the server"
            )
        case ssl.SSLCertVerificationError():
            return RefusedError(
                f"{rabbitmq_at(settings, 'tls.ca_file', at=at)} shows a certificate that is not trusted: "
                f"{error.verify_message}. {trust_it(error)}"
            )
        case ssl.SSLError() if refuses_ours(error):
            own = settings.tls.cert_file
            refused = f"refuses the certificate in {own}" if own else "asks for a client certificate, and none is set"
            return LoginError(
                f"{rabbitmq_at(settings, 'tls.cert_file', at=at)} {refused}: {error.reason}. Name one that is in date "
                "and that an authority has signed which the broker trusts"
            )
        case ssl.SSLError() if error.reason == "WRONG_VERSION_NUMBER":
            return RefusedError(
                f"{broker} does not speak TLS, and the URL begins with amqps://; write amqp://, or the port for TLS "
                "(usually 5671)"
            )
        case ssl.SSLError():
            return RefusedError(f"{broker} refuses the TLS handshake: {error.reason or error}{_hint(settings)}")
        case socket.gaierror():
            return BrokerUnavailableError(f"{broker} cannot be found, its host has no address: {error.strerror}")
        case ConnectionResetError() | ConnectionAbortedError() if address.tls:
            return BrokerUnavailableError(
                f"{broker} ended the connection during the TLS handshake; the URL begins with amqps://: is this a "
                "port for TLS (usually 5671)?"
            )
    return BrokerUnavailableError(f"{broker} does not answer: {error or type(error).__name__}")
