"""Finds a sink's class by the type that the settings name: the entry points of group ``pgbridge.sinks``."""

from importlib.metadata import entry_points
from typing import cast

from bridge.brokers.contract import Sink
from bridge.errors import SettingsError
from bridge.settings import SinkSettings


def build_sink(settings: SinkSettings) -> Sink:
    """The sink for these settings, not yet open. Raises SettingsError when none of that type is installed."""
    points = list(entry_points(group="pgbridge.sinks", name=settings.type))
    if not points:
        raise SettingsError(f"there is no sink of type {settings.type!r}")
    return cast(Sink, points[0].load()(settings))
