"""Which error a closure is: where it happened decides together with the reply code, for our AMQP and for aio-pika."""

import ssl

import aio_pika.exceptions
import aiormq.exceptions
import pytest
from pydantic import SecretStr

from bridge.brokers.rabbitmq.client import closure_of
from bridge.brokers.rabbitmq.closure import Closure, During, error_of
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.errors import (
    BrokerUnavailableError,
    LoginError,
    PgbridgeError,
    PrivilegeError,
    RefusedError,
    TopologyError,
)

SETTINGS = RabbitMQSettings.model_validate(
    {"type": "rabbitmq", "url": SecretStr("amqp://us er:hunter2@mq/the%20shop")}, context={"sink": "events"}
)


@pytest.mark.parametrize(
    ("during", "code", "error", "says"),
    [
        ("greeting", 0, BrokerUnavailableError, "amqps://"),
        ("login", 403, LoginError, "refuses the user 'us er' or its password: SAID"),
        ("login", 0, BrokerUnavailableError, "step 'login'"),
        ("virtual host", 530, RefusedError, "rabbitmqctl add_vhost 'the shop'"),
        ("virtual host", 541, BrokerUnavailableError, "step 'virtual host'"),
        ("declaring", 403, PrivilegeError, "rabbitmqctl set_permissions -p 'the shop' 'us er' CONFIGURE WRITE READ"),
        ("declaring", 404, TopologyError, "pgbridge topology --apply"),
        ("declaring", 405, TopologyError, "other properties"),
        ("declaring", 406, TopologyError, "other properties"),
        ("use", 403, PrivilegeError, "SAID"),
        ("use", 404, TopologyError, "SAID"),
        ("use", 406, BrokerUnavailableError, "ended the connection"),
        ("use", 320, BrokerUnavailableError, "ended the connection"),
        ("use", 530, BrokerUnavailableError, "ended the connection"),
    ],
)
def test_where_it_happened_decides_with_the_code(
    during: During, code: int, error: type[PgbridgeError], says: str
) -> None:
    raised = error_of(SETTINGS, Closure("closed", code, said="SAID", during=during))
    assert type(raised) is error
    assert str(raised).startswith("sinks.events.url: RabbitMQ at mq:5672 ")
    assert says in str(raised)
    assert "SAID" in str(raised)


@pytest.mark.parametrize("code", [311, 406, 501, 502, 503, 504, 505, 540, 541])
def test_some_codes_blame_what_was_sent(code: int) -> None:
    assert Closure("closed", code).blames_content
    assert not Closure("closed", code, during="virtual host").blames_content


@pytest.mark.parametrize("code", [0, 200, 312, 313, 320, 402, 403, 404, 405, 506, 530])
def test_other_codes_blame_settings_permissions_operators_or_nothing(code: int) -> None:
    assert not Closure("closed", code).blames_content


def test_a_handshake_that_tls_broke_is_told_as_tls_tells_it() -> None:
    cause = ssl.SSLError()
    cause.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    assert type(error_of(SETTINGS, Closure("broke", during="greeting", cause=cause))) is LoginError
    assert type(error_of(SETTINGS, Closure("broke", during="use", cause=cause))) is BrokerUnavailableError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (aio_pika.exceptions.ChannelNotFoundEntity("NOT_FOUND - no queue"), 404, "NOT_FOUND - no queue"),
        (aio_pika.exceptions.ChannelPreconditionFailed("x"), 406, "x"),
        (aiormq.exceptions.ChannelAccessRefused("x"), 403, "x"),
        (aiormq.exceptions.ChannelLockedResource("x"), 405, "x"),
        (aiormq.exceptions.ConnectionNotAllowed("x"), 530, "x"),
        (aiormq.exceptions.ConnectionClosed(320, "CONNECTION_FORCED"), 320, "CONNECTION_FORCED"),
        (aiormq.exceptions.ChannelClosed(541, "x"), 541, "x"),
        (aiormq.exceptions.ChannelClosed(None, None), 0, ""),
        (aiormq.exceptions.ChannelInvalidStateError("gone"), 0, ""),
        (ConnectionResetError(), 0, ""),
        (None, 0, ""),
    ],
)
def test_what_aio_pika_raises_is_read_by_its_type(error: BaseException | None, code: int, said: str) -> None:
    closure = closure_of(error)
    assert (closure.code, closure.said) == (code, said)
    assert closure.reason
