"""A partner of the shop's, who gets a webhook for each order: counts those whose signature is good."""

import base64
import binascii
import hashlib
import hmac
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Self

from bridge.demo.servers.process import LOOPBACK, free_port

_LARGEST: Final = 1_000_000
"""Bytes of a webhook."""


class Partner:
    """An endpoint on loopback while it is entered. It checks signatures (Standard Webhooks, v1) by itself."""

    def __init__(self) -> None:
        self.secret = ""
        """``whsec_...``, as the shop was told."""
        self.received: Counter[str] = Counter()
        """How often each webhook came, by its id."""
        self.refused = 0
        """Webhooks that nobody signed."""
        self._http = _Server((LOOPBACK, free_port()), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, name="partner", daemon=True)

    @property
    def url(self) -> str:
        """Where webhooks go."""
        return f"http://{LOOPBACK}:{self._http.server_port}/orders"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def signed(self, id: str, timestamp: str, signatures: str, body: bytes) -> bool:
        """Whether one of the signatures is ours."""
        try:
            key = base64.b64decode(self.secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            return False
        wanted = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
        good = f"v1,{base64.b64encode(wanted).decode()}"
        return any(hmac.compare_digest(good, each) for each in signatures.split())


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that may wait to be accepted; the library's 5 are too few for a sender."""


def _handler(partner: Partner) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(min(length, _LARGEST))
            id, timestamp, signature = (
                self.headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature")
            )
            good = len(body) == length and partner.signed(id, timestamp, signature, body)
            if good:
                partner.received[id] += 1
            else:
                partner.refused += 1
            self.send_response(204 if good else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """The screen shows how many came."""

    return Handler
