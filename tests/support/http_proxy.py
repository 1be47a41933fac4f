"""An HTTP proxy: CONNECT, and whole URLs in the request line. It keeps what it was asked.

async with HttpProxy() as proxy:
    ...  # http://127.0.0.1:{proxy.port}
    proxy.leads = {"93.184.216.34:443": ("127.0.0.1", receiver.port)}
    proxy.status = 403  # from now on it refuses
"""

import asyncio
import contextlib
from typing import Self
from urllib.parse import urlsplit


class HttpProxy:
    """A proxy on this loop."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        """Method, target and headers of each connection's first request; names of headers in lower case."""
        self.leads: dict[str, tuple[str, int]] = {}
        """Where a `host:port` really is. Others are where they say."""
        self.status: int | None = None
        """What it answers to everything instead."""
        self.silent = False
        """Whether it ends each connection without an answer."""
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for each in self._connections:
            each.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio's for a coroutine callback logs an error when it is cancelled (Python 3.11).
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            method, target, _ = first.split(" ")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            self.asked.append((method, target, headers))
            if self.silent:
                return
            if self.status is not None:
                writer.write(f"HTTP/1.1 {self.status} No\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
                return
            there = target if method == "CONNECT" else urlsplit(target).netloc
            host, _, port = there.rpartition(":")
            from_there, to_there = await asyncio.open_connection(*self.leads.get(there, (host.strip("[]"), int(port))))
            writers.append(to_there)
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                to_there.write(head.encode("latin-1"))
            async with asyncio.TaskGroup() as directions:
                directions.create_task(_forward(reader, to_there))
                directions.create_task(_forward(from_there, writer))
        except* (OSError, asyncio.IncompleteReadError):
            # One side has left. The other one's connection ends below.
            pass
        finally:
            for each in writers:
                each.close()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65_536):
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):  # the other side may have left before
        writer.write_eof()
