"""A receiver of webhooks that behaves as badly as it is asked to, by the path of the request.

with WebhookReceiver() as receiver:
    ...  # POST to receiver.url("/hang")

=====================================  ==================================================================
``/status/<number>?retry-after=<...>``  that status; ``body=<bytes>`` gives it a body of so many bytes
``/redirect?to=<url>``                  302 to there
``/hang``                               no answer, until the client leaves
``/drip``, ``/drip-headers``            a body, or headers, of which a byte comes now and then
``/endless``, ``/huge``                 a body without an end, or of 1 GiB
``/chunks``                             a body without an end, in chunks of one byte with long extensions
``/headers``, ``/interim``              headers without an end, or answers 103
``/close``, ``/reset``                  the connection ends, or is reset, before the answer
``/cut``                                it ends in the middle of the body
``/leave``                              it ends after an answer that says keep-alive
``/late``                               it ends when the second request on it has come
``/garbage``                            what is not HTTP
``/raw?hex=<...>``                      these bytes
``/broken-tls``                         the beginning of an answer, and then what is not TLS
=====================================  ==================================================================
"""

import contextlib
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final, Self
from urllib.parse import parse_qsl, urlsplit

from tests.support.certificates import Certificate

_DRIP: Final = 0.05
"""Seconds between two bytes that drip."""

_HANG: Final = 60.0
"""Seconds after which a connection ends whose client does not leave."""

_PIECE: Final = b"x" * 65_536


@dataclass(frozen=True, slots=True)
class Received:
    """One request."""

    path: str
    """With its query."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    at: float
    """By time.monotonic()."""
    connection: int
    """The connections are numbered from 0, in the order in which they came."""


class WebhookReceiver:
    """A server on threads. Its counters may be read from any thread."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        port: int = 0,
        certificate: Certificate | None = None,
        no_handshake: bool = False,
    ) -> None:
        """With a certificate it speaks TLS, but for `no_handshake`: then it says nothing at all."""
        self.requests: list[Received] = []
        self.sent = 0
        """Bytes that were sent, as far as the kernel took them."""
        self._changed = threading.Condition()
        self._accepted: list[tuple[object, ...]] = []
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._no_handshake = no_handshake
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate.file, certificate.key)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=512)
        self.host, self.port = self._listener.getsockname()[:2]

    def url(self, path: str = "/status/200", host: str | None = None) -> str:
        """Of this receiver, under its address or under a name."""
        shown = host or (f"[{self.host}]" if ":" in self.host else self.host)
        return f"{'https' if self._context else 'http'}://{shown}:{self.port}{path}"

    @property
    def open(self) -> int:
        """Connections that neither side has ended, as far as is known here."""
        return len(self._open)

    def connections(self) -> int:
        """How many came so far. It connects by itself, and so knows that none before it is still on its way."""
        with socket.create_connection((self.host, self.port)) as own, self._changed:
            address = own.getsockname()
            assert self._changed.wait_for(lambda: address in self._accepted, 20)
            number = self._accepted.index(address)
            self._accepted.remove(address)
            return number

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        # Wakes the thread in accept(), which closing alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            for each in self._open:
                with contextlib.suppress(OSError):  # the client has left
                    each.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="webhook-receiver", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed: the end of the block
                return
            with self._changed:
                self._accepted.append(address)
                self._open.append(connection)
                self._changed.notify_all()
                self._start(self._serve, connection, number)
            number += 1

    def _serve(self, plain: socket.socket, number: int) -> None:
        connection = plain
        try:
            if self._no_handshake:
                self._until_left(plain)
                return
            if self._context is not None:
                connection = self._context.wrap_socket(plain, server_side=True)
                with self._changed:
                    self._open[self._open.index(plain)] = connection
            with connection.makefile("rb") as reader:
                earlier = 0
                while (request := self._read(reader, number)) is not None and self._answer(
                    connection, request, earlier
                ):
                    earlier += 1
        except OSError:
            # The client has left, which is what many tests are about.
            pass
        finally:
            with self._changed:
                self._open[:] = [each for each in self._open if each is not connection and each is not plain]
            connection.close()

    def _read(self, reader: BinaryIO, number: int) -> Received | None:
        first = reader.readline().decode("latin-1").split(" ")
        if len(first) != 3 or not first[2].startswith("HTTP/"):
            return None  # the end, or what is not HTTP, as TLS to a receiver without
        headers = {}
        while line := reader.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = reader.read(int(headers.get("content-length", 0)))
        address = urlsplit(first[1])
        path = address.path + (f"?{address.query}" if address.query else "")
        request = Received(path, headers, body, time.monotonic(), number)
        self.requests.append(request)
        return request

    def _answer(self, connection: socket.socket, request: Received, earlier: int) -> bool:
        """Whether the connection goes on. Raises OSError where the client has left."""
        address = urlsplit(request.path)
        asked = dict(parse_qsl(address.query, keep_blank_values=True))
        match address.path.split("/")[1:]:
            case ["status", number]:
                extra = {"Retry-After": asked["retry-after"]} if "retry-after" in asked else {}
                self._send(connection, _head(int(number), int(asked.get("body", 0)), extra))
                self._send(connection, b"x" * int(asked.get("body", 0)))
                return True
            case ["redirect"]:
                self._send(connection, _head(302, 0, {"Location": asked["to"]}))
                return True
            case ["hang"]:
                self._until_left(connection)
            case ["drip"]:
                self._send(connection, _head(200, 1000))
                self._drip(connection, b"x" * 1000)
            case ["drip-headers"]:
                self._drip(connection, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000)
            case ["endless"]:
                self._send(connection, b"HTTP/1.1 200 OK\r\n\r\n")
                self._for_ever(connection, _PIECE)
            case ["huge"]:
                self._send(connection, _head(200, 1 << 30))
                self._for_ever(connection, _PIECE)
            case ["chunks"]:
                self._send(connection, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                self._for_ever(connection, b"1;" + b"x" * 50_000 + b"\r\nx\r\n")
            case ["headers"]:
                self._send(connection, b"HTTP/1.1 200 OK\r\n")
                self._for_ever(connection, b"A: b\r\n" * 10_000)
            case ["interim"]:
                self._for_ever(connection, b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" * 1000)
            case ["close"]:
                pass
            case ["reset"]:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case ["cut"]:
                self._send(connection, _head(200, 1000) + b"x" * 10)
            case ["leave"]:
                self._send(connection, _head(200, 0, {"Connection": "keep-alive", "Keep-Alive": "timeout=60"}))
            case ["late"]:
                if not earlier:
                    self._send(connection, _head(200, 0))
                    return True
            case ["garbage"]:
                self._send(connection, b"220 mail.example.com ESMTP\r\n")
            case ["raw"]:
                self._send(connection, bytes.fromhex(asked["hex"]))
            case ["broken-tls"]:
                self._send(connection, b"HTTP/1.1 200 O")
                with socket.socket(fileno=os.dup(connection.fileno())) as plain:
                    self._send(plain, b"what is not TLS")
            case _:
                self._send(connection, _head(404, 0))
                return True
        return False

    def _send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        self.sent += len(data)

    def _for_ever(self, connection: socket.socket, piece: bytes) -> None:
        while True:
            self._send(connection, piece)

    def _drip(self, connection: socket.socket, data: bytes) -> None:
        for byte in _each(data):
            self._send(connection, byte)
            if select.select([connection], [], [], _DRIP)[0]:
                return  # readable: the client has left

    def _until_left(self, connection: socket.socket) -> None:
        connection.settimeout(_HANG)
        while connection.recv(65_536):
            pass


def _each(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def _head(status: int, length: int, headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode()
