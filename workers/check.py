"""What `pgbridge check` looks at for each worker, found through the entry points of the group ``pgbridge.checks``."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from bridge.brokers.registry import broker_of
from bridge.settings import Settings
from workers.build import make_inbox, subscription
from workers.loading import load_handler, require_reply


def checks(settings: Settings) -> Mapping[str, Callable[[], Awaitable[str]]]:
    """By ``worker <name>``, what looks at it: returns what was found in words, or raises a PgbridgeError."""
    return {f"worker {name}": partial(_look, name, settings) for name in settings.workers}


async def _look(name: str, settings: Settings) -> str:
    """Everything that a start of the worker would find, in its order, and nothing is handled."""
    own = settings.workers[name]
    handler = load_handler(own.handler, name, own.path)
    handler.configured(own.options, name)
    require_reply(name, own, handler)
    wanted = subscription(name, own, handler.topics)
    inbox = make_inbox(name, settings)
    try:
        await inbox.open()
    finally:
        await inbox.close()
    sink = settings.sinks[settings.sink_of(name)]
    queue = broker_of(sink).queue(sink, wanted)
    try:
        await queue.open()
    finally:
        await queue.close()
    return f"{own.handler}, reply {own.reply or 'none'}"
