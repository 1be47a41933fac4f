"""The handlers of the latency rows, which note when an event came, and of the others, which do nothing or fail."""

import atexit
import os
import struct
import time

from workers import Event, Retry, handler

RECORD = struct.Struct("ddii")
"""When emit() ran and when the event arrived, in seconds since 1970; the client that emitted it, and its count."""

FILE = "BENCH_LATENCY_FILE"

# Buffered, so that writing costs the handler nothing; the buffer is written out when the process ends.
_file = open(os.environ[FILE], "ab", buffering=1 << 20) if FILE in os.environ else None  # noqa: SIM115
if _file is not None:
    atexit.register(_file.close)


@handler("bench.#")
async def note(event: Event) -> None:
    now = time.time()
    if _file is None:
        raise RuntimeError(f"set {FILE}")
    body = event.json()
    _file.write(RECORD.pack(body["t"], now, body["client"], body["n"]))


@handler("bench.#")
async def nothing(event: Event) -> None:
    """For what a worker costs by itself."""


@handler("bench.#")
async def ok(event: Event) -> dict[str, bool]:
    """The same, with a result for the reply."""
    return {"ok": True}


FAILING = frozenset(f"key-{number}" for number in range(10))
"""Keys whose events fail whenever they are tried."""


@handler("bench.#")
async def fail_some(event: Event) -> None:
    """Nothing, but for the keys that fail."""
    if event.key in FAILING:
        raise Retry("this key fails")
