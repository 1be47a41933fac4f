"""An HTTP proxy on the way to the endpoints: where it is, and how it is asked for a connection to one of them."""

import re
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import unquote

import httpcore

from workers.webhooks.url import bracketed

_URL: Final = re.compile(
    r"http://((?P<user>[^:@/]*)(:(?P<password>[^@/]*))?@)?(\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[\w.-]+)):(?P<port>[0-9]{1,5})/?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Proxy:
    """One HTTP proxy. It is the operator's, so its own address is not checked."""

    host: str
    port: int
    headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    """What it is to be told with each request: who we are."""

    @classmethod
    def parse(cls, url: str) -> Self:
        """From ``http://[user:password@]host:port``. Raises ValueError, which does not show the URL."""
        found = _URL.fullmatch(url)
        if found is None or not 0 < int(found["port"]) < 65_536:
            raise ValueError("a proxy is given as http://[user:password@]host:port, with %XX for other characters")
        headers = []
        if found["user"] is not None:
            login = f"{unquote(found['user'])}:{unquote(found['password'] or '')}".encode()
            headers.append((b"Proxy-Authorization", b"Basic " + b64encode(login)))
        return cls(found["v6"] or found["name"], int(found["port"]), tuple(headers))

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    @property
    def url(self) -> httpcore.URL:
        """Without user and password."""
        return httpcore.URL(scheme="http", host=self.host, port=self.port, target="/")

    async def open(self) -> httpcore.AsyncNetworkStream:
        """A connection to it. Raises httpcore.ProxyError."""
        try:
            return await httpcore.AnyIOBackend().connect_tcp(self.host, self.port)
        except httpcore.NetworkError as error:
            raise httpcore.ProxyError(f"the proxy {self} cannot be reached") from error

    async def connect(self, host: str, port: int) -> httpcore.AsyncNetworkStream:
        """A connection through it to this host. Raises httpcore.ProxyError."""
        there = f"{bracketed(host)}:{port}".encode()
        request = httpcore.Request(
            "CONNECT",
            httpcore.URL(scheme="http", host=self.host, port=self.port, target=there),
            headers=[(b"Host", there), *self.headers],
        )
        connection = httpcore.AsyncHTTP11Connection(origin=self.url.origin, stream=await self.open())
        try:
            response = await connection.handle_async_request(request)
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise httpcore.ProxyError(f"the proxy {self} did not answer CONNECT") from error
        if not 200 <= response.status < 300:
            await connection.aclose()
            raise httpcore.ProxyError(f"the proxy {self} answered {response.status} to CONNECT")
        connected: httpcore.AsyncNetworkStream = response.extensions["network_stream"]
        return connected
