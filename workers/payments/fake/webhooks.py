"""The webhooks that the account sends: signed as Stripe does, sent until they are taken, several times on command."""

import hashlib
import hmac
import itertools
import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Final

_TIMEOUT: Final = 10.0
_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 2.0
"""Seconds. Stripe waits for hours; whoever tests does not."""


def signature(secret: str, body: bytes, at: float) -> str:
    """The header ``Stripe-Signature`` of a body that is sent at this time, in seconds since 1970."""
    signed = hmac.new(secret.encode(), f"{int(at)}.".encode() + body, hashlib.sha256)
    return f"t={int(at)},v1={signed.hexdigest()}"


class Webhooks:
    """Sends what happens, in its order, on a thread of its own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._number = itertools.count(1)
        self._waiting: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._secret = ""
        self._url = ""
        self._copies = 1
        self.refused: list[int] = []
        """The statuses of answers that were no success."""

    def send_to(self, url: str, secret: str, *, copies: int = 1) -> None:
        """From now on; each `copies` times."""
        self._url, self._secret, self._copies = url, secret, copies
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="fake-stripe-webhooks", daemon=True)
            self._thread.start()

    def happened(self, type: str, thing: Mapping[str, Any]) -> None:
        """Tells whoever listens that this became of an object."""
        if not self._url:
            return
        event = {
            "id": f"evt_fake{next(self._number):012d}",
            "object": "event",
            "type": type,
            "created": int(self._clock()),
            "livemode": False,
            "data": {"object": thing},
        }
        body = json.dumps(event).encode()
        for _ in range(self._copies):
            self._waiting.put((self._url, body))

    def close(self) -> None:
        """What was not taken by now is forgotten."""
        self._ended.set()
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    def _send_all(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            wait = _FIRST_WAIT
            while not (self._ended.is_set() or self._send(*waiting)):
                self._ended.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)

    def _send(self, url: str, body: bytes) -> bool:
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": signature(self._secret, body, self._clock()),
        }
        request = urllib.request.Request(url, body, headers)  # noqa: S310 - whoever tests says where to
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT):  # noqa: S310
                return True
        except urllib.error.HTTPError as error:
            self.refused.append(error.code)
        except OSError:
            self.refused.append(0)
        return False
