"""`/health` and `/metrics` of the workers, as whoever watches them sees these."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

_INTERVAL: Final = 0.5
_LIMIT: Final = 1.0
"""Seconds for an answer; a frozen process gives none."""


class Watch:
    """Asks every process, twice a second."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        """`ports` of the processes, by name."""
        self.ports = ports
        self.seen: Counter[str] = Counter()
        """Answers, by whether they were ``ok`` or ``failing``, and ``silent`` for none."""
        self.failing_during: Counter[str] = Counter()
        """Answers that were failing, by the kinds of fault that went on."""
        self.faults: set[str] = set()
        """What goes on now; set by who plays faults."""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            for status in await asyncio.gather(*(_status(port) for port in self.ports.values())):
                self.seen[status] += 1
                if status == "failing":
                    self.failing_during.update(self.faults or {"none"})
            await asyncio.sleep(_INTERVAL)

    async def wrong(self, limit: float) -> list[str]:
        """Which processes are not well, or have something in hand, after `limit` seconds to become so."""
        deadline = asyncio.get_running_loop().time() + limit
        while True:
            found = [f"{name}: {words}" for name, port in self.ports.items() if (words := await _problem(port))]
            if not found or asyncio.get_running_loop().time() > deadline:
                return found
            await asyncio.sleep(_INTERVAL)


async def _status(port: int) -> str:
    health = await _health(port)
    return "silent" if health is None else str(health["status"])


async def _health(port: int) -> Any | None:
    text = await _get(port, "/health")
    return None if text is None else json.loads(text)


async def _problem(port: int) -> str | None:
    health, metrics = await _health(port), await _get(port, "/metrics")
    if health is None or metrics is None:
        return "it does not answer"
    if health["status"] != "ok":
        return f"it says {health}"
    in_hand = re.search(r"^pgbridge_worker_in_hand\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert in_hand is not None, metrics
    return f"it has {in_hand[1]} deliveries in hand" if float(in_hand[1]) else None


async def _get(port: int, path: str) -> str | None:
    """What it answers; None where it does not."""
    try:
        async with asyncio.timeout(_LIMIT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                answer = (await reader.read()).decode()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    return answer.partition("\r\n\r\n")[2] or None
