"""The fake over HTTP: Stripe's paths under ``/v1``, and its own under ``/_fake`` for whoever tests with it.

``POST /_fake/faults`` takes a JSON list of faults (see ``faults.Fault``), ``GET /_fake/ledger`` tells whenever money
moved, ``POST /_fake/settle`` with ``{"payment_intent": ..., "succeeded": true}`` ends what waits for bank or customer,
``POST /_fake/clock`` with ``{"seconds": ...}`` moves the clock on, so that keys are forgotten, and
``POST /_fake/webhooks`` with ``{"url": ..., "secret": ..., "copies": 1}`` has it send webhooks from then on.
"""

import base64
import json
import re
import select
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlsplit

from workers.payments.fake.account import Account
from workers.payments.fake.errors import StripeRefusal
from workers.payments.fake.faults import KINDS, Fault, Faults, Kind
from workers.payments.fake.idempotency import Answer, Idempotency
from workers.payments.fake.webhooks import Webhooks

KEPT: Final = 24 * 3600.0
"""Seconds for which keys are kept: at least so long, says Stripe."""

_LONGEST_KEY: Final = 255
_LONGEST_BODY: Final = 1_000_000
_HANG: Final = 300.0
"""Seconds after which a connection that hangs ends, unless its client ends it."""


class FakeStripe:
    """A server on a thread. As a context manager it runs from begin to end of the block."""

    def __init__(self, port: int = 0, *, secret_key: str = "sk_test_fake", keep: float = KEPT) -> None:  # noqa: S107
        """Port 0 takes any that is free. `keep`: seconds for which idempotency keys are known."""
        self.secret_key = secret_key
        basic = base64.b64encode(f"{secret_key}:".encode()).decode()
        self.logins = (f"Bearer {secret_key}", f"Basic {basic}")
        """What the header `Authorization` must be one of."""
        self.faults = Faults()
        self._ahead = 0.0
        self.webhooks = Webhooks(self.now)
        self.account = Account(self.now, self.webhooks.happened)
        self._layer = Idempotency(self.now, keep)
        self._http = _Server(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="fake-stripe", daemon=True)

    @property
    def url(self) -> str:
        """For `StripeClient(base_addresses={"api": url})`."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def now(self) -> float:
        """Seconds since 1970, by the fake's clock."""
        return time.time() + self._ahead

    def advance(self, seconds: float) -> None:
        """Moves the clock on."""
        self._ahead += seconds

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.webhooks.close()

    def serve(self) -> None:
        """Serves in this thread, until it is interrupted."""
        self._http.serve_forever()

    def post(self, path: str, key: str | None, given: Mapping[str, Any], fault: Kind | None) -> Answer:
        """One request that changes something. Raises StripeRefusal."""
        if fault == "conflict":
            raise StripeRefusal(409, "idempotency_error", "In use", code="idempotency_key_in_use")
        if key is not None and len(key) > _LONGEST_KEY:
            raise StripeRefusal(400, "idempotency_error", f"An idempotency key has {_LONGEST_KEY} characters at most")

        def execute() -> Answer:
            if fault == "error_before":
                return _broken()
            answer = Answer(200, self._execute(path, given))
            return _broken() if fault == "error_after" else answer

        return self._layer.once(key, path, given, execute)

    def _execute(self, path: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        match path.split("/")[2:]:
            case ["payment_intents"]:
                return self.account.create(given)
            case ["payment_intents", id, "capture"]:
                return self.account.capture(id, given)
            case ["payment_intents", id, "cancel"]:
                return self.account.cancel(id, given)
            case ["refunds"]:
                return self.account.refund(given)
        raise _no_path("POST", path)

    def get(self, path: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """One that only looks. Raises StripeRefusal."""
        match path.split("/")[2:]:
            case [("payment_intents" | "refunds") as kind]:
                return self.account.list(kind, given)
            case [("payment_intents" | "refunds") as kind, id]:
                return self.account.get(kind, id)
        raise _no_path("GET", path)

    def command(self, path: str, body: Any) -> Any:
        """What is under ``/_fake``. Raises StripeRefusal for what it does not know, and KeyError, TypeError and
        ValueError for bodies that do not fit."""
        match path.removeprefix("/_fake/"):
            case "faults":
                faults = [Fault(**each) for each in body]
                unknown = [fault.kind for fault in faults if fault.kind not in KINDS]
                if unknown:
                    raise ValueError(f"unknown kinds of faults: {unknown}; there are {', '.join(KINDS)}")
                self.faults.replace(faults)
            case "settle":
                return self.account.settle(body["payment_intent"], succeeded=body["succeeded"])
            case "webhooks":
                self.webhooks.send_to(body["url"], body["secret"], copies=body.get("copies", 1))
            case "clock":
                self.advance(body["seconds"])
            case "ledger":
                return {"charges": list(self.account.charges), "requests": self.faults.requests}
            case _:
                raise _no_path("POST", path)
        return {}


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that may wait to be accepted; with the 5 of the library some of twenty at once were reset."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed end connections as they like; whatever else is wrong is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def form(text: str) -> dict[str, Any]:
    """What Stripe's SDK sends: ``metadata[order]=7`` is a hash, ``expand[0]=x`` one with the keys of an array.

    Raises StripeRefusal where a name is a value and a hash at once.
    """
    found: dict[str, Any] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        *outer, last = re.findall(r"[^\[\]]+", name) or [name]
        place = found
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise StripeRefusal(400, "invalid_request_error", "Invalid hash", param=name)
        place[last] = value
    return found


def _broken() -> Answer:
    return Answer(500, {"error": {"type": "api_error", "message": "An unknown error occurred"}})


def _no_path(method: str, path: str) -> StripeRefusal:
    message = f"Unrecognized request URL ({method}: {path})."
    return StripeRefusal(404, "invalid_request_error", message)


def _handler(stripe: FakeStripe) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if address.path.startswith("/_fake/"):
                self._own(address.path, None)
                return
            self._answer(lambda: Answer(200, stripe.get(address.path, form(address.query))))

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if length > _LONGEST_BODY:
                self.close_connection = True
                self._send(413, {"error": {"type": "invalid_request_error", "message": "The body is too large"}})
                return
            raw = self.rfile.read(length)
            if len(raw) < length:  # its client is gone; what is left of a request may be a request, too
                self.close_connection = True
                return
            body = raw.decode(errors="replace")
            if self.path.startswith("/_fake/"):
                self._own(self.path, body)
                return
            fault = stripe.faults.next(self.path)
            key = self.headers.get("Idempotency-Key")
            match fault:
                case "rate":
                    message = "Request rate limit exceeded."
                    error = {"type": "invalid_request_error", "code": "rate_limit", "message": message}
                    self._send(429, {"error": error}, {"Retry-After": "1", "Stripe-Should-Retry": "true"})
                case "lock":
                    message = "This object cannot be accessed right now because another API request is accessing it."
                    error = {"type": "invalid_request_error", "code": "lock_timeout", "message": message}
                    self._send(429, {"error": error}, {"Stripe-Should-Retry": "true"})
                case "hang_before" | "drop_before":
                    self._leave(fault)
                case "hang_after" | "drop_after":
                    try:
                        stripe.post(self.path, key, form(body), fault)
                    except StripeRefusal as refusal:
                        self.log_message("never told: %s", refusal)
                    self._leave(fault)
                case _:
                    self._answer(lambda: stripe.post(self.path, key, form(body), fault))

        def _own(self, path: str, body: str | None) -> None:
            try:
                self._send(200, stripe.command(path, json.loads(body) if body else None))
            except StripeRefusal as refusal:
                self._send(refusal.status, refusal.body)
            except (KeyError, TypeError, ValueError) as error:
                self._send(400, {"error": {"type": "fake_error", "message": f"{type(error).__name__}: {error}"}})

        def _leave(self, fault: Kind) -> None:
            if fault.startswith("hang"):
                select.select([self.connection], [], [], _HANG)  # readable once the client has left
            self.close_connection = True

        def _answer(self, work: Any) -> None:
            if self.headers.get("Authorization") not in stripe.logins:
                self._send(401, {"error": {"type": "invalid_request_error", "message": "Invalid API Key provided"}})
                return
            try:
                answer = work()
            except StripeRefusal as refusal:
                self._send(refusal.status, refusal.body)
            else:
                replayed = {"Idempotent-Replayed": "true"} if answer.replayed else {}
                self._send(answer.status, answer.body, replayed)

        def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            """Whoever tests with it has logs of their own."""

    return Handler
