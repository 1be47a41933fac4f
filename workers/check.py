"""What `pgbridge check` looks at for each worker, found through the entry points of the group ``pgbridge.checks``."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from bridge.settings import Settings
from workers.build import make_inbox
from workers.loading import load_handler, require_reply


def checks(settings: Settings) -> Mapping[str, Callable[[], Awaitable[str]]]:
    """By ``worker <name>``, what looks at it: returns what was found in words, or raises a PgbridgeError."""
    return {f"worker {name}": partial(_look, name, settings) for name in settings.workers}


async def _look(name: str, settings: Settings) -> str:
    """What a start of the worker would find before it comes to its queue, in its order; at the queue, which needs no
    handler, the bridge's part of the command looks."""
    own = settings.workers[name]
    handler = load_handler(own.handler, name, own.path)
    handler.configured(own.options, name)
    require_reply(name, own, handler)
    inbox = make_inbox(name, settings)
    try:
        await inbox.open()
    finally:
        await inbox.close()
    return f"{own.handler}, reply {own.reply or 'none'}"
