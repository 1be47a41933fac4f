"""What the brokers have of what the settings need, and how it is declared."""

from collections.abc import Sequence
from importlib.metadata import entry_points

from bridge.brokers.contract import Declaration
from bridge.brokers.registry import build_sink
from bridge.settings import Settings


async def topology(settings: Settings, *, apply: bool) -> Sequence[tuple[str, Sequence[Declaration]]]:
    """Pairs of an owner (``sink <name>``, ``worker <name>``) and its declarations; with `apply`, declares the missing.

    Raises BrokerUnavailableError, SettingsError.
    """
    found = [(f"sink {name}", await build_sink(sink).topology(apply=apply)) for name, sink in settings.sinks.items()]
    # The workers' part comes through an entry point: the bridge never imports them.
    for point in entry_points(group="pgbridge.topology"):
        found += await point.load()(settings, apply=apply)
    return found
