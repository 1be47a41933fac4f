"""Workers act on events. All that an author of a worker imports is here.

    from workers import Event, Reject, Retry, handler

    @handler("shop.invoice.requested")
    async def render(event: Event) -> dict | None: ...

The way of one message, continued from `bridge`:

1. ``queues/`` hold one consumer each: they give deliveries, and settle them.
2. ``runtime.py`` takes a delivery, claims the event in ``inbox.py``, and runs the handler.
3. What the handler returns goes to the worker's reply function, in one transaction with the inbox row,
   so that this database effect happens exactly once.
4. Then the delivery is acknowledged; or, after a failure, tried again later; or dead-lettered.
5. ``cli.py`` is the command ``pgbridge-worker``.
"""

from bridge.event import Event
from workers.handler import Handler, Reject, Retry, handler

__all__ = ["Event", "Handler", "Reject", "Retry", "handler"]
