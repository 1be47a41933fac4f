"""The broker's limit: frames that were encoded before the clock starts, from one socket, with all confirms counted.

Nothing is read, encoded or stored while the clock runs, so no publisher with one connection can do better for
these messages. The frames are those of the bridge's own encoder, so the messages are the same byte for byte.
"""

import json
import select
import socket
import struct
import sys
import time
from urllib.parse import urlsplit

from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.header import ProtocolHeader

from bridge.brokers.rabbitmq.frames import Encoder
from tests.bench.peers.log import events
from tests.support.frames import together

FRAME_MAX = 131_072
PIECE = 262_144
"""Bytes handed to the kernel at once."""
_CONFIRM = struct.Struct(">BHIHHQBB")
"""A whole basic.ack or basic.nack frame: type, channel, size, class, method, tag, flags, end."""
_BASIC, _ACK = 60, 80


class Broker:
    """A blocking connection that knows just enough AMQP to publish with confirms."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port or 5672))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""
        self.socket.sendall(ProtocolHeader().marshal())
        self._next()
        login = f"\0{parts.username}\0{parts.password}"
        self.call(0, commands.Connection.StartOk({}, "PLAIN", login, "en_US"))
        self._send(0, commands.Connection.TuneOk(8, FRAME_MAX, 0))
        self.call(0, commands.Connection.Open("/"))
        self.call(1, commands.Channel.Open())
        self.call(1, commands.Confirm.Select())

    def _send(self, channel: int, method: Frame) -> None:
        self.socket.sendall(frame.marshal(method, channel))

    def call(self, channel: int, method: Frame) -> None:
        self._send(channel, method)
        self._next()

    def _next(self) -> None:
        while True:
            if len(self.rest) >= 7:
                size = 8 + int.from_bytes(self.rest[3:7])
                if len(self.rest) >= size:
                    self.rest = self.rest[size:]
                    return
            data = self.socket.recv(65_536)
            if not data:
                raise RuntimeError("the broker ended the connection")
            self.rest += data


class Confirms:
    """Counts confirms, out of order and `multiple` ones too."""

    def __init__(self) -> None:
        self.floor = 0
        """All tags up to this one are confirmed."""
        self._early: set[int] = set()
        self._rest = b""

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) // _CONFIRM.size * _CONFIRM.size
        self._rest = data[whole:]
        early = self._early
        for _, _, _, kind, method, tag, multiple, _ in _CONFIRM.iter_unpack(data[:whole]):
            if kind != _BASIC or method != _ACK:
                raise RuntimeError(f"instead of a confirm came method {kind}.{method}")
            if multiple:
                self.floor = max(self.floor, tag)
                early.difference_update([known for known in early if known <= self.floor])
            elif tag == self.floor + 1:
                self.floor = tag
            else:
                early.add(tag)
            while early and self.floor + 1 in early:
                self.floor += 1
                early.discard(self.floor)

    @property
    def confirmed(self) -> int:
        return self.floor + len(self._early)


def encoded(dsn: str, exchange: str, count: int) -> list[tuple[bytes, int]]:
    """Pieces of about PIECE bytes, each with the number of the last message that it completes."""
    encoder = Encoder(exchange, FRAME_MAX, 1 << 30)
    pieces: list[tuple[bytes, int]] = []
    chunk: list[bytes] = []
    size = number = 0
    for number, event in enumerate(events(dsn, count), 1):
        chunk.append(together(encoder.encode(event)))
        size += len(chunk[-1])
        if size >= PIECE:
            pieces.append((b"".join(chunk), number))
            chunk, size = [], 0
    if chunk:
        pieces.append((b"".join(chunk), number))
    return pieces


def publish(broker: Broker, pieces: list[tuple[bytes, int]], window: int) -> None:
    """Sends everything with at most `window` messages unconfirmed (0: no limit), until all are confirmed."""
    connection = broker.socket
    connection.setblocking(False)
    confirms = Confirms()
    total = pieces[-1][1]
    index = 0
    left = memoryview(pieces[0][0])
    while confirms.confirmed < total:
        open_window = index < len(pieces) and (not window or pieces[index][1] - confirms.confirmed <= window)
        readable, writable, _ = select.select([connection], [connection] if open_window else [], [], 60)
        if not readable and not writable:
            raise RuntimeError(f"{confirms.confirmed} of {total} were confirmed, then nothing came for 60 s")
        if readable:
            data = connection.recv(1 << 20)
            if not data:
                raise RuntimeError("the broker ended the connection")
            confirms.feed(data)
        if writable:
            left = left[connection.send(left) :]
            if not left:
                index += 1
                left = memoryview(pieces[index][0]) if index < len(pieces) else memoryview(b"")


def main(url: str, exchange: str, dsn: str, count: int, window: int) -> None:
    pieces = encoded(dsn, exchange, count)
    broker = Broker(url)
    began = time.perf_counter()
    publish(broker, pieces, window)
    print(json.dumps({"messages": count, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
