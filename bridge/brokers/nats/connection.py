"""A connection to NATS that stays lost once it is lost; whoever owns it opens another."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import nats.aio.client
import nats.errors
from nats.js.errors import APIError

import bridge
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.tls import tls_context
from bridge.errors import BrokerUnavailableError, SettingsError

CONNECT_TIMEOUT = 10.0
"""Seconds."""

PING_INTERVAL = 10.0
"""Seconds; a server that leaves two pings unanswered is dead."""

REQUEST_TIMEOUT = 5.0
"""Seconds for one answer of JetStream."""

_CLOSE_LIMIT = 3.0
_WATCH_INTERVAL = 0.1

Client = nats.aio.client.Client


def address_of(settings: NatsSettings) -> str:
    """The servers without user and password, for people. Raises SettingsError for what is no URL."""
    hosts = []
    for url in settings.url.get_secret_value().split(","):
        try:
            parts = urlsplit(url.strip() if "//" in url else f"nats://{url.strip()}")
            host, port = parts.hostname, parts.port or 4222
        except ValueError:
            host, port = None, 0
        if not host:
            raise SettingsError("url: is no URL of NATS; write nats://user:password@host:4222, or several with commas")
        hosts.append(f"{host}:{port}")
    return ", ".join(hosts)


async def connect(
    settings: NatsSettings,
    *,
    told: Callable[[Exception], Awaitable[None]] | None = None,
) -> Client:
    """A connection that stays lost once it is lost. `told` gets what the server complains of.

    Raises BrokerUnavailableError.
    """
    address = address_of(settings)
    urls = [url.strip() for url in settings.url.get_secret_value().split(",")]
    uses_tls = any(url.startswith("tls:") for url in urls) or settings.tls.model_fields_set
    problems: list[str] = []

    async def note(error: Exception) -> None:
        problems.append(str(error) or type(error).__name__)
        if told is not None:
            await told(error)

    client = Client()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await client.connect(
                urls,
                error_cb=note,
                name=f"pgbridge {bridge.__version__}",
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=int(CONNECT_TIMEOUT),
                ping_interval=int(PING_INTERVAL),
                # Whoever publishes waits for room by himself (see NatsSink), in the order of his calls.
                pending_size=0,
                tls=tls_context(settings.tls, settings.key) if uses_tls else None,
            )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        await disconnect(client)
        reason = problems[0] if problems else str(error) or f"no answer within {CONNECT_TIMEOUT:g} s"
        raise BrokerUnavailableError(f"NATS at {address} cannot be reached: {reason}") from None
    except BaseException:
        await disconnect(client)
        raise
    for task in (client._reading_task, client._flusher_task, client._ping_interval_task):
        if task is not None:
            task.add_done_callback(_end_quietly)
    return client


def _end_quietly(task: asyncio.Task[None]) -> None:
    """A task of nats-py that dies of a broken connection: `until_lost` tells that, asyncio need not log it again."""
    if not task.cancelled() and not isinstance(task.exception(), OSError | nats.errors.Error | None):
        asyncio.get_running_loop().call_exception_handler(
            {"message": "a task of nats-py failed", "exception": task.exception(), "task": task}
        )


async def until_lost(client: Client) -> None:
    """Returns once the connection is lost or closed.

    It asks, since nats-py's `closed_cb` is not called when the last flush of a broken connection fails or hangs.
    """
    while client.is_connected:  # noqa: ASYNC110
        await asyncio.sleep(_WATCH_INTERVAL)


async def disconnect(client: Client) -> None:
    """Closes a connection, by force when the server no longer reads what is written."""
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        async with asyncio.timeout(_CLOSE_LIMIT):
            await client.close()
    writer = getattr(client._transport, "_io_writer", None)  # nats-py offers no way to close without a flush
    if writer is not None:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def asking(address: str) -> AsyncIterator[None]:
    """Turns what nats-py raises for a server that is silent or gone into BrokerUnavailableError."""
    try:
        yield
    except APIError as error:
        raise BrokerUnavailableError(f"NATS at {address}: {error.description or error}") from error
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise BrokerUnavailableError(f"NATS at {address} did not answer: {error or type(error).__name__}") from error
