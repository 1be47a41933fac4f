"""Workers act on events. All that an author of a worker imports is here.

    from workers import Event, Reject, Retry, handler

    @handler("shop.invoice.requested")
    async def render(event: Event) -> dict | None: ...

The way of one message, continued from `bridge`:

1. A queue of ``bridge.brokers`` gives deliveries, and settles them.
2. ``worker.py`` takes a delivery, and ``attempt.py`` claims its event in ``inbox.py`` and runs the handler.
3. What the handler returns goes to the worker's reply function, in one transaction with the inbox row, so that this
   database effect happens exactly once. ``effects.py`` records what happens outside of the database.
4. Then the delivery is acknowledged; or, after a failure, tried again later; or dead-lettered.

``loading.py`` finds the handler that the settings name, ``testing.py`` runs handlers in tests, and ``cli.py`` is the
command ``pgbridge-worker``. ``invoices/`` and ``payments/`` are workers that ship.
"""

import sys

import pgbridge

try:
    from bridge.event import Event
    from workers.effects import Effect, EffectChanged, EffectUnknown, effect
    from workers.handler import Handler, Options, Reject, Retry, handler
except ImportError as error:
    other = pgbridge.found_instead("bridge")
    if other is None:
        raise
    if sys.argv[0] == "-m":  # `python -m workers`, which would show a traceback
        pgbridge.require_ours("pgbridge-worker")
    raise ImportError(pgbridge.in_the_way("bridge", other)) from error

__all__ = [
    "Effect",
    "EffectChanged",
    "EffectUnknown",
    "Event",
    "Handler",
    "Options",
    "Reject",
    "Retry",
    "effect",
    "handler",
]
