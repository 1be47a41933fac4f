"""Connections to endpoints: a name is resolved once, all its addresses are checked, and one of these is connected to.

`CheckedNetwork` stands where httpcore would resolve and connect by itself, so nothing is connected to unchecked, and
DNS that changes its mind after the check finds nothing to change.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from ssl import SSLContext
from typing import Any, Final

import anyio
import httpcore

from workers.webhooks.addresses import AddressRefused, AddressRule
from workers.webhooks.proxy import Proxy

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a name, given the port that is wanted. Raises OSError where there are none."""

_LOOKUPS: Final = 64
"""Most names that are looked up at once. The loop's own threads are a handful, and DNS servers that never answer, which
cost their owners nothing, would stop all deliveries."""

_TRIED: Final = 4
"""Most addresses of one name that are tried. All are checked."""

_MOST_RECEIVED: Final = 64 * 1024
_READ: Final = 16 * 1024
"""Bytes of one answer, and of one read. A body is left earlier, but headers and interim answers (1xx) need have no end;
each interim answer costs some 50 µs, in which the loop does nothing else."""


class NameUnresolved(Exception):  # noqa: N818 - what happened, as in AddressRefused
    """A name without an address."""


class ConnectionEnded(httpcore.ReadError):
    """The connection ended before anything of an answer came."""

    def __init__(self, *, reused: bool) -> None:
        super().__init__("the connection was closed without an answer")
        self.reused = reused
        """Whether it had brought answers before: then it had ended while it was idle, or was just about to."""


class Lookups:
    """The system's resolver, in threads of its own. Called, it is a `Resolve`."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="webhook-names")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Raises OSError."""
        found = await asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host, port)
        return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))

    def close(self) -> None:
        """Lookups that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects httpcore to what the rule lets through, by way of the proxy if there is one."""

    def __init__(
        self,
        rule: AddressRule,
        resolve: Resolve,
        *,
        timeout: float,
        only_allowed: bool = False,
        proxy: Proxy | None = None,
        proxy_resolves: bool = False,
    ) -> None:
        """`timeout`, in seconds, is that of an exchange: where a name has several addresses, one that is silent leaves
        time for the next. `only_allowed`: only addresses that `allow` has. `proxy_resolves`: names are the proxy's.
        """
        self._rule = rule
        self._resolve = resolve
        self._timeout = timeout
        self._only_allowed = only_allowed
        self._proxy = proxy
        self._proxy_resolves = proxy_resolves
        self._sockets = httpcore.AnyIOBackend()

    async def hosts(self, host: str, port: int) -> list[str]:
        """What to connect to for this host: addresses that were checked, or the name where the proxy resolves it.

        Raises AddressRefused and NameUnresolved.
        """
        answers = await self._answers(host, port)
        if answers is None:
            return [host]
        return [str(address) for address in self._rule.check(host, answers, only_allowed=self._only_allowed)]

    async def _answers(self, host: str, port: int) -> Sequence[str] | None:
        """None where the proxy resolves."""
        if _is_address(host):
            return [host]
        if self._proxy_resolves:
            if host == "localhost" or host.endswith(".localhost"):
                return ["127.0.0.1"]  # by RFC 6761 a name of this address everywhere, so of the proxy's own host
            if self._only_allowed:
                raise AddressRefused(
                    host, host, "a name for the proxy, and http is for addresses that are allowed only"
                )
            return None
        try:
            answers = await self._resolve(host, port)
        except OSError as error:
            raise NameUnresolved(f"the name {host} does not resolve: {error.strerror or error}") from error
        if not answers:
            raise NameUnresolved(f"the name {host} does not resolve: it has no addresses")
        return answers

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's; ours is that of the whole exchange
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises AddressRefused and NameUnresolved, and httpcore's exceptions for the rest."""
        *others, last = (await self.hosts(host, port))[:_TRIED]
        share = self._timeout / (len(others) + 2)
        for each in others:
            try:
                async with asyncio.timeout(share):
                    return await self._connect(each, port)
            except (httpcore.NetworkError, httpcore.ProxyError, TimeoutError):
                continue  # the error of the last one is what is told
        return await self._connect(last, port)

    async def _connect(self, host: str, port: int) -> httpcore.AsyncNetworkStream:
        if self._proxy is None:
            return _Stream(await self._sockets.connect_tcp(host, port))
        return _Stream(await self._proxy.connect(host, port))


class ProxyNetwork(httpcore.AsyncNetworkBackend):
    """Connects httpcore to the proxy, wherever it wants to go."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises httpcore.ProxyError."""
        return _Stream(await self._proxy.open())


class _Stream(httpcore.AsyncNetworkStream):
    """A connection on which answers are bounded, and of which is known whether it had brought answers before."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._received = 0
        """Bytes since the last request."""
        self._reused = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        try:
            data = await self._stream.read(min(max_bytes, _READ), timeout)
        except (httpcore.ReadError, OSError) as error:  # OSError: what TLS says after the handshake
            if self._reused and not self._received:
                raise ConnectionEnded(reused=True) from error
            raise httpcore.ReadError(error) from error
        if not data and not self._received:
            raise ConnectionEnded(reused=self._reused)
        self._received += len(data)
        if self._received > _MOST_RECEIVED:
            raise httpcore.RemoteProtocolError(f"more than {_MOST_RECEIVED // 1024} KiB, and no end of the headers")
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        if self._received:
            self._received, self._reused = 0, True
        try:
            await self._stream.write(buffer, timeout)
        except (anyio.EndOfStream, OSError) as error:
            raise httpcore.WriteError(error) from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        except BaseException:
            # httpcore leaves a connection open whose handshake is cancelled, and the other side may never end it.
            await self.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
