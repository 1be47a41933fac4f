"""One HTTP client for all endpoints. What an endpoint does, however hostile, is an `Answer` within a time and a size.

`connections` bounds the posts at once; those above wait, and their time begins when they no longer do, so that a full
house is never an endpoint's failure.
"""

import asyncio
import contextlib
import os
import re
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import httpcore

from bridge import __version__
from workers.webhooks.addresses import AddressRefused, AddressRule, Network
from workers.webhooks.network import CheckedNetwork, ConnectionEnded, Lookups, NameUnresolved, ProxyNetwork, Resolve
from workers.webhooks.proxy import Proxy
from workers.webhooks.url import Url, UrlRefused, bracketed, parse

MOST_OF_ANSWER: Final = 4096
"""Bytes of an answer's body that are read."""

_LONGEST_WAIT: Final = 86_400.0
"""Seconds: whoever asks for more with Retry-After gets this."""

_IDLE: Final = 4.0
"""Seconds for which a connection waits for the next post: less than the 5 after which Node and Apache close theirs."""

_MOST_SAID: Final = 200
"""Characters of what went wrong that a library tells, which may quote the endpoint."""

_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(r"([!-~]([ \t!-~]*[!-~])?)?")
_OURS: Final = frozenset(
    (
        *("connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    )
)
"""Headers that are the client's to send."""

_NETWORK: Final = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.TimeoutException,
    OSError,
)
"""What httpcore raises for what an endpoint or the network does."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a post: a status, or an error."""

    status: int | None
    """Once the endpoint has said it, it counts: also where the body behind it did not end, or not in time."""
    body: bytes = b""
    """The first `MOST_OF_ANSWER` bytes, or what came of them."""
    retry_after: float | None = None
    """Seconds, a day at most; the header Retry-After."""
    duration: float = 0.0
    """Seconds."""
    error: str = ""
    """What went wrong, for a person. It shows neither path nor query of the URL."""
    refused: bool = False
    """Whether nothing was sent, since the URL or the address is one that must not be connected to."""


class WebhookClient:
    """POSTs to endpoints, over HTTP/1.1. Follows no redirects."""

    def __init__(
        self,
        *,
        timeout: float,
        allow: Sequence[Network] = (),
        proxy: str | None = None,
        ca_file: Path | None = None,
        proxy_resolves: bool = False,
        connections: int = 256,
        resolve: Resolve | None = None,
    ) -> None:
        """`timeout`: seconds for one post in all. `allow`: networks that are not public and may be connected to; these
        also by http. `proxy`: ``http://[user:password@]host:port``, which is asked for addresses that were checked, or
        with `proxy_resolves` for names. `ca_file`: who signs certificates, instead of those whom the system trusts.
        `connections`: most posts at once. `resolve`: another resolver than the system's.

        Raises ValueError for a proxy, a network or a file that cannot be used.
        """
        if proxy_resolves and proxy is None:
            raise ValueError("there is no proxy that could resolve names")
        self._timeout = timeout
        self._proxy = Proxy.parse(proxy) if proxy is not None else None
        self._lookups = Lookups()
        self._slots = asyncio.Semaphore(connections)
        rule, resolve = AddressRule(allow), resolve or self._lookups
        https = CheckedNetwork(rule, resolve, timeout=timeout, proxy=self._proxy, proxy_resolves=proxy_resolves)
        self._http = CheckedNetwork(rule, resolve, timeout=timeout, only_allowed=True, proxy_resolves=proxy_resolves)
        self._https = _Network(https, context=_context(ca_file))
        self._plain = _Network(ProxyNetwork(self._proxy) if self._proxy else self._http, proxy=self._proxy)
        self._origins: OrderedDict[tuple[str, str, int], _Origin] = OrderedDict()
        """Those that have connections, or had some a moment ago; the last one used is the last."""

    def __repr__(self) -> str:
        return f"WebhookClient(timeout={self._timeout:g}, proxy={self._proxy!r})"

    async def aclose(self) -> None:
        """Closes the connections."""
        for origin in self._origins.values():
            await origin.pool.aclose()
        self._lookups.close()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Sends this once. Whatever the endpoint and the network do is in the answer.

        Sends it again only where a connection that was kept ended before an answer began: the endpoint had left it, or
        has died with it. Raises ValueError for headers that cannot be sent.
        """
        sent = _sent(headers)
        try:
            there = parse(url)
        except UrlRefused as error:
            return Answer(None, error=str(error), refused=True)
        async with self._slots, self._pool_of(there) as pool:
            return await self._exchange(pool, there, body, sent)

    @contextlib.asynccontextmanager
    async def _pool_of(self, there: Url) -> AsyncIterator[httpcore.AsyncConnectionPool]:
        """The origin's own. httpcore looks at every connection of a pool for every request, which in one pool for all
        took most of the time; what one origin has is a few."""
        key = (there.scheme, there.host, there.port)
        origin = self._origins.get(key)
        if origin is None:
            network = self._https if there.scheme == "https" else self._plain
            origin = self._origins[key] = _Origin(_pool(network))
        origin.posts += 1
        try:
            yield origin.pool
        finally:
            origin.posts -= 1
            origin.used_at = time.monotonic()
            self._origins.move_to_end(key)
            await self._leave_idle()

    async def _leave_idle(self) -> None:
        """Closes what was not used for so long that its connections are of no use."""
        before = time.monotonic() - _IDLE
        while self._origins:
            key, oldest = next(iter(self._origins.items()))
            if oldest.posts:
                self._origins.move_to_end(key)
                return
            if oldest.used_at > before:
                return
            del self._origins[key]
            await oldest.pool.aclose()

    async def _exchange(
        self, pool: httpcore.AsyncConnectionPool, there: Url, body: bytes, headers: list[tuple[bytes, bytes]]
    ) -> Answer:
        begun = time.monotonic()
        response: httpcore.Response | None = None
        received = bytearray()
        error, refused = "", False
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._send(pool, there, body, headers)
                async for part in response.aiter_stream():
                    received += part
                    if len(received) > MOST_OF_ANSWER:
                        break
        except TimeoutError:
            error = f"timed out after {self._timeout:g} s"
        except AddressRefused as why:
            error, refused = str(why), True
        except NameUnresolved as why:
            error = str(why)
        except _NETWORK as why:
            error = _in_words(why, there)
        finally:
            # Not within the time: cut off in its middle, it would leave the connection to nobody.
            if response is not None:
                await response.aclose()
        duration = time.monotonic() - begun
        if response is None:
            return Answer(None, duration=duration, error=error, refused=refused)
        return Answer(response.status, bytes(received[:MOST_OF_ANSWER]), _retry_after(response), duration)

    async def _send(
        self, pool: httpcore.AsyncConnectionPool, there: Url, body: bytes, headers: list[tuple[bytes, bytes]]
    ) -> httpcore.Response:
        host = there.host
        if there.scheme == "http" and self._proxy is not None:
            # The proxy gets the whole URL, with an address that was checked in the place of the name.
            host = bracketed((await self._http.hosts(there.host, there.port))[0])
        request = httpcore.Request(
            "POST",
            httpcore.URL(scheme=there.scheme, host=host, port=there.port, target=there.target),
            headers=[(b"Host", there.authority.encode()), (b"Content-Length", b"%d" % len(body)), *headers],
            content=body,
        )
        while True:
            try:
                return await pool.handle_async_request(request)
            except ConnectionEnded as error:
                # It closes one kept connection each time, and a new one is never a reused one.
                if not error.reused:
                    raise


@dataclass(frozen=True, slots=True)
class _Network:
    """How origins of a scheme are reached."""

    backend: httpcore.AsyncNetworkBackend
    context: ssl.SSLContext | None = None
    proxy: Proxy | None = None


@dataclass(slots=True)
class _Origin:
    pool: httpcore.AsyncConnectionPool
    posts: int = 0
    """That are on their way."""
    used_at: float = 0.0


def _pool(network: _Network) -> httpcore.AsyncConnectionPool:
    proxy = network.proxy
    return httpcore.AsyncConnectionPool(
        ssl_context=network.context,
        proxy=httpcore.Proxy(proxy.url, headers=proxy.headers) if proxy is not None else None,
        max_connections=None,  # the client's slots bound them, and a pool's own queue would count as an endpoint's time
        max_keepalive_connections=None,
        keepalive_expiry=_IDLE,
        retries=0,
        network_backend=network.backend,
    )


def _context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ValueError(f"{ca_file} holds no certificates that can be read: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _sent(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Raises ValueError, without showing values: they may be secrets."""
    for name, value in headers.items():
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the header {name!r} holds characters that a header may not hold")
        if name.lower() in _OURS:
            raise ValueError(f"the header {name} is the client's own")
    given = {"User-Agent": f"pgbridge/{__version__}"} if "user-agent" not in map(str.lower, headers) else {}
    return [(name.encode(), value.encode()) for name, value in {**given, **headers}.items()]


def _retry_after(response: httpcore.Response) -> float | None:
    """Both forms: seconds, and a date."""
    text = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"").decode("latin-1")
    if text.isascii() and text.isdigit():
        return min(float(text), _LONGEST_WAIT)
    with contextlib.suppress(ValueError):  # anything else says nothing
        at = datetime.strptime(text, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
        return min(max((at - datetime.now(UTC)).total_seconds(), 0.0), _LONGEST_WAIT)
    return None


def _in_words(error: BaseException, there: Url) -> str:
    if isinstance(error, ConnectionEnded | httpcore.ProxyError):
        return str(error)
    match _cause(error):
        case ssl.SSLCertVerificationError() as cause:
            return f"TLS: {cause.verify_message}"
        case ssl.SSLError() as cause:
            return f"TLS: {(cause.reason or str(cause)).replace('_', ' ').lower()}"[:_MOST_SAID]
        case OSError(errno=int() as number):
            return f"{there.authority}: {os.strerror(number).lower()}"
    if isinstance(error, httpcore.ProtocolError):
        return f"the answer is not HTTP/1.1: {error}"[:_MOST_SAID]
    if isinstance(error, httpcore.ConnectError):
        return "the connection ended in the TLS handshake"
    return f"the connection broke: {error}"[:_MOST_SAID]


def _cause(error: BaseException) -> BaseException:
    """The error at the bottom. httpcore puts what it translates into its own error, since the pool drops the cause."""
    inner = error.args[0] if error.args and isinstance(error.args[0], BaseException) else error.__cause__
    return error if inner is None else _cause(inner)
