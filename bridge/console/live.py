"""Server-sent events: a stream that ends when the process stops, when its browser goes, and when it does not read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from starlette.types import Receive, Scope, Send

from bridge.console.access import HEADERS

_PATIENCE: Final = 10.0
"""Seconds in which a browser must take an event."""


class EventStream:
    """An ASGI response. `events` are texts of any number of lines."""

    def __init__(self, events: AsyncIterator[str]) -> None:
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            **HEADERS,
            "Content-Type": "text/event-stream; charset=utf-8",
            "X-Accel-Buffering": "no",  # nginx would keep events back
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        sending = asyncio.ensure_future(self._send(send, raw))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # It has gone, or does not read, and the end of this response ends the connection.
        with suppress(TimeoutError, OSError):
            async for event in self._events:
                async with asyncio.timeout(_PATIENCE):
                    await send({"type": "http.response.body", "body": _framed(event), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _framed(event: str) -> bytes:
    return "".join([*(f"data: {line}\n" for line in event.splitlines()), "\n"]).encode()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
