"""An HTTP server for a few small questions, in threads of its own, which no client can wear out.

It takes few connections at once, since file descriptors are for the broker and PostgreSQL; and it reads a few
kilobytes, for some seconds. Where all places are taken, the oldest connection that has not asked yet makes room, so
that clients who say nothing, or say it slowly, keep nobody out.
"""

import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Lock, Semaphore
from typing import Any, Final, NamedTuple

import structlog

log = structlog.get_logger()

CONNECTIONS: Final = 16
"""Served at once."""
PATIENCE: Final = 5.0
"""Seconds in which a question must be asked, whole, and in which its answer must be taken."""
LARGEST: Final = 8192
"""Bytes of a question: the request's line and its headers."""
_MOMENT: Final = 0.2
"""Seconds in which a connection that was cut gives its place away."""


class Answer(NamedTuple):
    """What a question is answered with."""

    status: int
    content_type: str
    body: bytes


class BoundedServer(ThreadingHTTPServer):
    """Answers GET and HEAD by `answer`, which gets the path and the header `Accept`, and is called in other threads."""

    request_queue_size = 64

    def __init__(self, host: str, port: int, answer: Callable[[str, str], Answer]) -> None:
        """`host` may be an IPv6 address in brackets. Raises OSError where it cannot listen there."""
        self.address_family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        self.answer = answer
        self._places = Semaphore(CONNECTIONS)
        self._lock = Lock()
        self._silent: dict[socket.socket, None] = {}
        """Connections on which nothing was asked yet, the oldest first."""
        super().__init__((host.strip("[]"), port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._takes_place():
            self.shutdown_request(request)
            return
        with self._lock:
            self._silent[request] = None
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def has_asked(self, request: socket.socket) -> None:
        """The connection's question is known, so that it need not make room any more."""
        with self._lock:
            self._silent.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """For what the thread of a connection raised. Clients that go, or do not take their answer, are no error."""
        error = sys.exception()
        if isinstance(error, OSError):
            log.debug("http.client_gone", reason=str(error))
        else:
            log.error("http.crashed", exc_info=error)

    def _takes_place(self) -> bool:
        if self._places.acquire(blocking=False):
            return True
        return self._makes_room() and self._places.acquire(timeout=_MOMENT)

    def _makes_room(self) -> bool:
        with self._lock:
            oldest = next(iter(self._silent), None)
            if oldest is None:
                return False
            del self._silent[oldest]
            with suppress(OSError):  # it has gone by itself
                oldest.shutdown(socket.SHUT_RDWR)
            return True

    def _leave(self, request: socket.socket) -> None:
        with self._lock:
            self._silent.pop(request, None)
        self._places.release()


class _Handler(BaseHTTPRequestHandler):
    """One connection, which asks once."""

    server: BoundedServer
    connection: socket.socket

    def handle(self) -> None:
        head = self._head()
        if head is None:
            return
        self.server.has_asked(self.connection)
        self.connection.settimeout(PATIENCE)
        self.rfile = BytesIO(head)
        self.handle_one_request()

    def _head(self) -> bytes | None:
        """The request's line and headers; None where they do not come, whole, in time."""
        deadline = time.monotonic() + PATIENCE
        head = b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            if len(head) > LARGEST:
                self.connection.sendall(b"HTTP/1.0 431 Request Header Fields Too Large\r\n\r\n")
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self.connection.settimeout(left)
            try:
                more = self.connection.recv(LARGEST)
            except TimeoutError:
                return None
            if not more:
                return None
            head += more
        return head

    def do_GET(self) -> None:
        self._answer(self.path.partition("?")[0])

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def _answer(self, path: str) -> None:
        try:
            answer = self.server.answer(path, self.headers.get("Accept", ""))
        except Exception:  # whoever asks must hear that something is wrong, and a person why
            log.exception("http.crashed", path=path)
            answer = Answer(500, "text/plain", b"a defect of pgbridge; its log has more\n")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def version_string(self) -> str:
        return "pgbridge"

    def log_message(self, format: str, *args: Any) -> None:
        """No line for every look."""
