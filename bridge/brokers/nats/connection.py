"""A connection to NATS that stays lost once it is lost, and what each error of NATS means.

Sink, queue and dead letters open a `Connection`, and ask the server within `Connection.asking`: there, and in
`connect`, whatever nats-py raises becomes one of our errors, by `explained`.

The server says some refusals without being asked: a line ``-ERR`` that belongs to no request, as when a subject is
not permitted. The request itself is then never answered. So that line ends whatever waits, and gives the reason.
"""

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import nats.aio.client
import nats.errors
import structlog
from nats.aio.client import RawCredentials
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError, ServiceUnavailableError
from nats.protocol.parser import AUTHORIZATION_VIOLATION, PERMISSIONS_ERR

import bridge
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.tls import OTHER_NAME, OUT_OF_DATE, refuses_ours, tls_context, trust_it
from bridge.errors import (
    BrokerUnavailableError,
    LoginError,
    PgbridgeError,
    PrivilegeError,
    RefusedError,
    TopologyError,
)

log = structlog.get_logger()

CONNECT_TIMEOUT: Final = 10.0
"""Seconds."""

PING_INTERVAL: Final = 10.0
"""Seconds; a server that leaves two pings unanswered is dead."""

_NO_PINGS: Final = 86400.0 * 365
"""Seconds; how nats-py is kept from pinging."""

REQUEST_TIMEOUT: Final = 5.0
"""Seconds for one answer of JetStream."""

_SILENCE: Final = 1.0
"""Seconds in which a server refuses a certificate, if it does."""

_CLOSE_LIMIT: Final = 3.0
"""Seconds that saying goodbye may take."""

_TIDY_LIMIT: Final = 0.1
"""Seconds that nats-py has for what is left of a connection that is lost, or was never made."""

_WATCH_INTERVAL: Final = 0.1
"""Seconds between two looks at whether the connection is lost."""

_NOT_FOR_ACCOUNT, _OFF, _NOT_STORED = 10039, 10076, 10077
"""Codes of JetStream's answers, from errors.json of nats-server."""

# The protocol has no codes for -ERR lines: their words, in any case, are what it defines.
_LOGIN_REFUSED: Final = (
    AUTHORIZATION_VIOLATION,
    "authentication timeout",
    "user authentication expired",
    "user authentication revoked",
    "account authentication expired",
)
_DENIED_PUBLISH: Final = re.compile(r'for publish to "(.*)"', re.IGNORECASE)

_ENDED: Final = (
    ConnectionResetError,
    BrokenPipeError,
    nats.errors.ConnectionClosedError,
    nats.errors.UnexpectedEOF,
)


class Client(nats.aio.client.Client):
    """nats-py's client, which otherwise encrypts only when the server asks for it, whatever the URL says, leaves its
    tasks behind when it cannot write to a connection that has ended, and reads no more after what it cannot take."""

    def __init__(self, *, encrypted: bool) -> None:
        super().__init__()
        self.left = False
        """Whether nothing more is to be written."""
        self._encrypted = encrypted

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if self.left or self.last_error is not None:
            self._pending, self._pending_data_size = [], 0
        await super()._close(status, do_cbs)

    async def _process_pong(self) -> None:
        # The answer to a ping that was given up, as when a server comes to itself, would end the reader.
        with contextlib.suppress(asyncio.InvalidStateError):
            await super()._process_pong()
        self._pings_outstanding = 0

    def _build_message(self, sid: int, subject: bytes, *rest: Any) -> Any:
        # Servers take any bytes in a subject; those that are not UTF-8 would end the reader.
        return super()._build_message(sid, subject.decode(errors="replace").encode(), *rest)

    def _connect_command(self) -> bytes:
        # The last moment before user and password are sent, and behind the TLS handshake, if there is one.
        if self._encrypted and not getattr(self, "_server_info", {}).get("tls_required"):
            raise nats.errors.SecureConnWantedError
        return super()._connect_command()


class Connection:
    """One connection, made by `connect`. `address` is where, for people, without user and password."""

    def __init__(
        self, settings: NatsSettings, denied: Callable[[PrivilegeError, str], None], ping_interval: int
    ) -> None:
        self.address = str(settings.servers)
        self.ping_interval = ping_interval
        self.client = Client(encrypted=settings.encrypted)
        self._settings = settings
        self._tell_denied = denied
        self._waiting: set[asyncio.Timeout] = set()
        self._denied: PrivilegeError | None = None
        self.heard: list[Exception] = []
        """What nats-py reported while it connected."""

    @property
    def is_open(self) -> bool:
        return self.client.is_connected and not self.client.left

    @property
    def last_words(self) -> str | None:
        """What the server gave as the reason, in an ``-ERR`` line, for which it ended the connection."""
        error = self.client.last_error
        words = _words_of(error) if type(error) is nats.errors.Error else ""
        # What it does not permit, it says too, and goes on.
        return words if words and not words.lower().startswith(PERMISSIONS_ERR) else None

    @property
    def ending(self) -> PgbridgeError:
        """Why it is lost."""
        return explained(self.client.last_error or nats.errors.ConnectionClosedError(), self._settings)

    def jetstream(self) -> JetStreamContext:
        return self.client.jetstream(timeout=REQUEST_TIMEOUT)

    async def hear(self, error: Exception) -> None:
        """What nats-py reports beside the answers to requests."""
        if not self.client.is_connected:
            self.heard.append(error)
            return
        if not isinstance(error, nats.errors.Error | OSError | PgbridgeError):
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a subscription of NATS failed", "exception": error}
            )
            return
        refusal = explained(error, self._settings)
        if not isinstance(refusal, PrivilegeError):
            return
        self._denied = refusal
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(0)
        subject = _DENIED_PUBLISH.search(str(error))
        self._tell_denied(refusal, subject.group(1) if subject else "")

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Around requests: raises what `explained` makes of nats-py's errors, and PrivilegeError as soon as the server
        says, by a line of its own, that a subject is not permitted."""
        limit = asyncio.timeout(None)
        self._waiting.add(limit)
        try:
            async with limit:
                yield
            # An answer that comes at the same moment may swallow the cancellation.
            if limit.expired() and self._denied is not None:
                raise self._denied
        except (nats.errors.Error, OSError, TimeoutError) as error:
            if limit.expired() and self._denied is not None:
                raise self._denied from error
            raise explained(error, self._settings) from error
        finally:
            self._waiting.discard(limit)

    async def round_trip(self) -> None:
        """Returns once the server has handled all that was sent before. Raises nats-py's errors.

        nats-py writes a ping ahead of what it has buffered: only the answer to a second one tells of that.
        """
        for _ in range(2):
            await self.client.flush(int(REQUEST_TIMEOUT))

    async def until_lost(self) -> None:
        """Returns once the connection is lost or closed.

        It asks, since nats-py's `closed_cb` is not called when the last flush of a broken connection fails or hangs.
        """
        while self.client.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(_WATCH_INTERVAL)

    def leave(self) -> None:
        """Ends it at once: nothing more is sent, not even what waits to be written. `close` follows."""
        self.client.left = True
        if (transport := transport_of(self.client)) is not None:
            transport.abort()

    async def close(self) -> None:
        """Says goodbye and closes, by force when the server no longer reads what is written."""
        # After a TLS handshake that failed, nats-py waits in vain for the end of a transport that has ended.
        limit = _CLOSE_LIMIT if self.client.is_connected else _TIDY_LIMIT
        # uvloop says RuntimeError where asyncio says OSError: what is to be written to has ended.
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError, RuntimeError):
            async with asyncio.timeout(limit):
                await self.client.close()
        if (transport := transport_of(self.client)) is not None:
            transport.abort()


def _nobody(refusal: PrivilegeError, subject: str) -> None:
    """For whoever hears of what is not permitted by its requests alone."""


async def connect(
    settings: NatsSettings, *, denied: Callable[[PrivilegeError, str], None] = _nobody, pings: bool = True
) -> Connection:
    """A connection that stays lost once it is lost.

    nats-py pings the server and ends the connection when two pings stay unanswered; without `pings`, whoever uses it
    sees to that.

    `denied` is called when the server says that a subject is not permitted, with that subject in lower case, as
    nats-py gives it, where the connection published to it; "" where it subscribed.

    Raises BrokerUnavailableError, LoginError, RefusedError; SettingsError for certificates that cannot be read.
    """
    tls = tls_context(settings.tls, settings.key) if settings.encrypted else None
    connection = Connection(settings, denied, int(PING_INTERVAL if pings else _NO_PINGS))
    try:
        await _open(connection, settings, tls)
    except (nats.errors.Error, OSError, TimeoutError) as error:
        await connection.close()
        # That no server is left to try says less than why the last one was given up.
        reason = connection.heard[-1] if connection.heard else error
        if isinstance(reason, _ENDED):
            reason = await _refusal(settings, tls) or reason
        raise explained(reason, settings) from error
    except BaseException:
        await connection.close()
        raise
    for task in tasks_of(connection.client):
        task.add_done_callback(_end_quietly)
    return connection


async def _refusal(settings: NatsSettings, tls: ssl.SSLContext | None) -> Exception | None:
    """Why a server ends our connections at once: what it says to one that sends nothing behind its login.

    nats-py sends a ping there, and meets the end of the connection before it has read the reason.
    """
    for address in settings.servers.addresses:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                if (refusal := await _asked_again(address, settings, tls)) is not None:
                    return refusal
        except (OSError, TimeoutError, ValueError) as error:
            if isinstance(error, ssl.SSLError) and refuses_ours(error):
                return error
            log.debug("nats.no_refusal", address=address, reason=str(error))
    return None


async def _asked_again(address: str, settings: NatsSettings, tls: ssl.SSLContext | None) -> Exception | None:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        greeting = json.loads((await reader.readline()).removeprefix(b"INFO "))
        if greeting.get("tls_required"):
            await writer.start_tls(tls or ssl.create_default_context(), server_hostname=host.strip("[]"))
            if greeting.get("tls_verify"):
                # In TLS 1.3 a certificate is refused only now, and what we send would destroy the answer.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SILENCE):
                        await reader.read(1)
        elif settings.encrypted:
            return nats.errors.SecureConnWantedError()
        servers, signed = settings.servers, settings.signed_login
        who = {"user": servers.user, "pass": servers.password, "auth_token": servers.token}
        login = {name: value for name, value in who.items() if value is not None}
        if signed is not None and "nonce" in greeting:
            login = signed.answer(greeting["nonce"])
        writer.write(b"CONNECT %b\r\n" % json.dumps({"verbose": True, "pedantic": False, **login}).encode())
        answer = (await reader.readline()).decode(errors="replace").strip()
        return nats.errors.Error(answer.removeprefix("-ERR ")) if answer.startswith("-ERR") else None
    finally:
        writer.close()


async def _open(connection: Connection, settings: NatsSettings, tls: ssl.SSLContext | None) -> None:
    servers = settings.servers
    nkey, credentials = settings.nkey.get_secret_value(), settings.credentials.get_secret_value()
    async with asyncio.timeout(CONNECT_TIMEOUT):
        await connection.client.connect(
            [f"{'tls' if settings.encrypted else 'nats'}://{address}" for address in servers.addresses],
            error_cb=connection.hear,
            name=f"pgbridge {bridge.__version__}",
            user=servers.user,
            password=servers.password,
            token=servers.token,
            nkeys_seed_str=nkey or None,
            user_credentials=RawCredentials(credentials) if credentials else None,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=int(CONNECT_TIMEOUT),
            ping_interval=connection.ping_interval,
            # Whoever publishes waits for room by himself (see NatsSink), in the order of his calls.
            pending_size=0,
            tls=tls,
        )
    if not connection.is_open:
        # nats-py takes the end of the connection for the answer to its first ping.
        raise nats.errors.ConnectionClosedError
    transport = transport_of(connection.client)
    if settings.encrypted and transport is not None and transport.get_extra_info("ssl_object") is None:
        raise nats.errors.SecureConnWantedError  # should a version of nats-py pass over `Client`


def explained(error: Exception, settings: NatsSettings) -> PgbridgeError:
    """What an error of nats-py, or one that it passes on, means for whoever runs pgbridge."""
    there = f"NATS at {settings.servers}"
    url, tls = settings.key("url"), settings.key("tls")
    match error:
        case ssl.SSLCertVerificationError(verify_code=code) if code in OTHER_NAME:
            return RefusedError(
                f"{url}: {there} shows a certificate that is not for this host: {error.verify_message}. "
                "Write the host as the certificate names it"
            )
        case ssl.SSLCertVerificationError(verify_code=code) if code in OUT_OF_DATE:
            return RefusedError(
                f"{url}: {there} shows a certificate that is out of date: {error.verify_message}. "
                "Renew it on the server"
            )
        case ssl.SSLCertVerificationError():
            return RefusedError(
                f"{tls}.ca_file: {there} shows a certificate that is not trusted: {error.verify_message}. "
                f"{trust_it(error)}"
            )
        case ssl.SSLError() if refuses_ours(error):
            return LoginError(
                f"{tls}.cert_file: {there} does not take our certificate, or wants one: {error.reason}. Name one that "
                "is in date and that an authority has signed which the server trusts"
            )
        case ssl.SSLError():
            return RefusedError(f"{url}: {there} makes no TLS connection: {error.reason or error}")
        case nats.errors.SecureConnWantedError():
            return RefusedError(
                f"{url}: {there} does not require TLS, so nothing would be encrypted: give the server certificates, "
                f"without allow_non_tls, or write nats:// and leave {tls} out"
            )
        case NotFoundError():
            return TopologyError(f"{url}: {there} says: {_described(error)}. Run `pgbridge topology --apply`")
        case ServiceUnavailableError() if error.err_code == _NOT_FOR_ACCOUNT:
            return RefusedError(
                f"{url}: JetStream is not enabled for this account of {there}: add `jetstream: enabled` to the account"
            )
        case ServiceUnavailableError() if error.err_code in (None, _OFF):  # None: nobody takes the requests
            return RefusedError(
                f"{url}: {there} runs without JetStream: add `jetstream {{}}` to the server's configuration"
            )
        case ServiceUnavailableError() if error.err_code == _NOT_STORED:  # as by a stream that is full
            return RefusedError(f"{url}: JetStream of {there} does not store the message: {_described(error)}")
        case ServiceUnavailableError():
            return BrokerUnavailableError(f"{url}: JetStream of {there} is not ready: {_described(error)}")
        case APIError():
            return RefusedError(f"{url}: JetStream of {there} refuses: {_described(error)}")
        case NoStreamResponseError() | nats.errors.NoRespondersError():
            return TopologyError(
                f"{url}: on {there} nothing takes what was sent: its stream or consumer is gone. "
                "Run `pgbridge topology --apply`"
            )
        case nats.errors.AuthorizationError():
            return _login_refused(settings)
        case nats.errors.Error() if type(error) is nats.errors.Error:
            return _said(_words_of(error), settings)
        case TimeoutError():
            return BrokerUnavailableError(f"{url}: {there} does not answer in time")
        case _ if isinstance(error, _ENDED):
            return BrokerUnavailableError(f"{url}: {there} ended the connection")
        case _:
            return BrokerUnavailableError(f"{url}: {there} does not answer: {error or type(error).__name__}")


def _words_of(error: Exception) -> str:
    return str(error).removeprefix("nats: ").strip("'")


def _said(words: str, settings: NatsSettings) -> PgbridgeError:
    """What the server gives as the reason in an ``-ERR`` line."""
    url, there = settings.key("url"), f"NATS at {settings.servers}"
    lower = words.lower()
    if lower.startswith(_LOGIN_REFUSED):
        return _login_refused(settings, words)
    if lower.startswith(PERMISSIONS_ERR):
        return PrivilegeError(
            f"{url}: {there} does not permit this to the user: {words}. "
            "Grant it in the permissions of the user or account"
        )
    return BrokerUnavailableError(f"{url}: {there} says: {words}")


def _login_refused(settings: NatsSettings, words: str = "") -> LoginError:
    field, what = "url", "the user, the password or the token"
    if settings.nkey.get_secret_value():
        field, what = "nkey", "the NKey; its public half must be a user's in the server's configuration"
    elif settings.credentials.get_secret_value():
        field, what = "credentials", "the JWT; the account that signed it must be one that the server knows"
    said = f": {words}" if words else ""
    return LoginError(f"{settings.key(field)}: NATS at {settings.servers} refuses {what}{said}")


def _described(error: APIError) -> str:
    return f"{error.description or 'no description'} ({error.err_code or error.code})"


def tasks_of(client: nats.aio.client.Client) -> list[asyncio.Task[None]]:
    """The tasks that nats-py runs for a connection; none of those that a version of it keeps elsewhere."""
    names = ("_reading_task", "_flusher_task", "_ping_interval_task")
    return [task for name in names if isinstance(task := getattr(client, name, None), asyncio.Task)]


def transport_of(client: nats.aio.client.Client) -> asyncio.WriteTransport | None:
    """What nats-py writes to, since it offers no way to close without a flush; None where it cannot be reached."""
    writer: Any = getattr(getattr(client, "_transport", None), "_io_writer", None)
    return getattr(writer, "transport", None)


def _end_quietly(task: asyncio.Task[None]) -> None:
    """A task of nats-py that ends with a broken connection: `until_lost` notices, so asyncio need not log it again."""
    if not task.cancelled() and not isinstance(task.exception(), OSError | nats.errors.Error | None):
        asyncio.get_running_loop().call_exception_handler(
            {"message": "a task of nats-py failed", "exception": task.exception(), "task": task}
        )
