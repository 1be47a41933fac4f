"""The handler of the latency rows: notes when an event reached it."""

import os
import struct
import time
from datetime import UTC, datetime

from workers import Event, handler

RECORD = struct.Struct("dd")
"""When the database recorded the event, and when the handler got it: seconds since 1970, one clock."""

FILE = "BENCH_LATENCY_FILE"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Buffered, so that writing costs the handler nothing; the buffer is written out when the process ends.
_file = open(os.environ[FILE], "ab", buffering=1 << 20) if FILE in os.environ else None  # noqa: SIM115


@handler("bench.#")
async def note(event: Event) -> None:
    now = time.time()
    if _file is None:
        raise RuntimeError(f"set {FILE}")
    _file.write(RECORD.pack((event.time - _EPOCH).total_seconds(), now))
