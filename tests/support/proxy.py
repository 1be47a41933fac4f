"""A TCP proxy between a client and a server, with which a test breaks the wire.

async with Proxy("127.0.0.1", postgres.port) as proxy:
    ...  # connect to 127.0.0.1:proxy.port
    proxy.delay_to_server = proxy.delay_to_client = 0.025  # 50 ms round trip
    proxy.rate_to_client = 1000  # the server's answers trickle
    proxy.blackhole = True  # what is sent is never delivered, and nobody is told
    proxy.cut()
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Self

from tests.support.servers import free_port

CHUNK = 65_536
"""Bytes read at once."""

TRICKLES_PER_SECOND = 50
"""Into how many pieces a second's bytes are cut where the rate is limited."""

CHUNKS_ON_THE_WIRE = 1000
"""Most chunks that one direction of one connection holds back: above any delay's need, yet bounded."""


class Proxy:
    """Forwards connections to one server. Its switches act at once on every connection, old and new."""

    def __init__(self, host: str, port: int) -> None:
        """`host` and `port` are the server's; they may be changed while it runs, for new connections."""
        self.target = (host, port)
        self.port = free_port()
        self.delay_to_server = 0.0
        """Seconds that every byte from the client spends on the wire. Order is kept; throughput is not limited."""
        self.delay_to_client = 0.0
        """The same for bytes from the server."""
        self.rate_to_server: int | None = None
        """Most bytes a second that reach the server on each connection; the rest is held back. None: no limit."""
        self.rate_to_client: int | None = None
        """The same for bytes from the server."""
        self.refuse = False
        """Whether new connections are reset as soon as they are made."""
        self.accepted = 0
        """Connections accepted so far, refused ones left out."""
        self.refused = 0
        """Connections refused so far."""
        self.heard_from_server = 0
        """Bytes that the server has sent so far, those that are held back among them."""
        self._passing = asyncio.Event()
        self._passing.set()
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def blackhole(self) -> bool:
        """Connections are accepted and stay open, but no byte passes. What was held back passes once this ends."""
        return not self._passing.is_set()

    @blackhole.setter
    def blackhole(self, on: bool) -> None:
        if on:
            self._passing.clear()
        else:
            self._passing.set()

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    def cut(self) -> None:
        """Resets every open connection, on both sides; what is on the wire is lost."""
        for connection in self._connections:
            connection.cancel()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=CHUNK)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            self.refused += 1
            _reset(writer)
            return
        self.accepted += 1
        # A task of our own: asyncio's for a coroutine callback logs an error when it is cancelled (Python 3.11).
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        ended_by_both = False
        try:
            await self._passing.wait()
            from_server, to_server = await asyncio.open_connection(*self.target, limit=CHUNK)
            writers.append(to_server)
            async with asyncio.TaskGroup() as directions:
                directions.create_task(
                    self._forward(reader, to_server, lambda: self.delay_to_server, lambda: self.rate_to_server)
                )
                directions.create_task(
                    self._forward(
                        from_server, writer, lambda: self.delay_to_client, lambda: self.rate_to_client, self._hear
                    )
                )
            ended_by_both = True
        except* OSError:
            # One side was reset or cannot be reached. What the proxy owes the other side is a reset, below.
            ended_by_both = False
        finally:
            for each in writers:
                if ended_by_both:
                    each.close()
                else:
                    _reset(each)

    def _hear(self, size: int) -> None:
        self.heard_from_server += size

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        delay: Callable[[], float],
        rate: Callable[[], int | None],
        heard: Callable[[int], None] = lambda _: None,
    ) -> None:
        """One direction, until its end, which is passed on too."""
        loop = asyncio.get_running_loop()
        wire: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_ON_THE_WIRE)

        async def deliver() -> None:
            while True:
                due, chunk = await wire.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._passing.wait()
                if not chunk:
                    writer.write_eof()
                    return
                while chunk:
                    limit = rate()
                    size = max(1, limit // TRICKLES_PER_SECOND) if limit else len(chunk)
                    await self._passing.wait()
                    writer.write(chunk[:size])
                    await writer.drain()
                    chunk = chunk[size:]
                    if limit:
                        await asyncio.sleep(size / limit)

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            chunk = b"more"
            while chunk:
                chunk = await reader.read(CHUNK)
                heard(len(chunk))
                await wire.put((loop.time() + delay(), chunk))


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST, which loses what is in its buffers."""
    connection = writer.get_extra_info("socket")
    if connection.fileno() != -1:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
