"""Workers act on events. All that an author of a worker imports is here.

    from workers import Event, Reject, Retry, handler

    @handler("shop.invoice.requested")
    async def render(event: Event) -> dict | None: ...

The way of one message, continued from `bridge`:

1. A queue of ``bridge/brokers`` gives deliveries, and settles them.
2. ``worker.py`` takes a delivery, and ``attempt.py`` claims its event in ``inbox.py`` and runs the handler.
3. What the handler returns goes to the worker's reply function, in one transaction with the inbox row,
   so that this database effect happens exactly once. ``effects.py`` records what happens outside.
4. Then the delivery is acknowledged; or, after a failure, tried again later; or dead-lettered.
5. ``cli.py`` is the command ``pgbridge-worker``.
"""

from bridge.event import Event
from workers.effects import Effect, effect
from workers.handler import Handler, Options, Reject, Retry, handler

__all__ = ["Effect", "Event", "Handler", "Options", "Reject", "Retry", "effect", "handler"]
