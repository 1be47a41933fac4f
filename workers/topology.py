"""What the workers need of their brokers, for `pgbridge topology` and `check`, which know no worker themselves.

Registered under the entry point group ``pgbridge.topology``.
"""

from collections.abc import Sequence

from bridge.errors import SettingsError
from bridge.observe.topology import Declaration
from bridge.settings import Settings
from workers.cli import queue_class
from workers.handler import load_handler
from workers.worker import subscription


async def of_workers(settings: Settings, *, apply: bool) -> Sequence[tuple[str, Sequence[Declaration]]]:
    """Pairs of ``worker <name>`` and its declarations. Raises SettingsError, BrokerUnavailableError."""
    found = []
    for name, worker in settings.workers.items():
        try:
            sink = settings.sink_of(name)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        handler = load_handler(worker.handler)
        queue = queue_class(sink, settings.sinks[sink])(
            settings.sinks[sink], subscription(name, worker, handler.topics)
        )
        found.append((f"worker {name}", await queue.topology(apply=apply)))
    return found
