"""Finds the broker that a sink's settings name, among the entry points of the group ``pgbridge.brokers``."""

from typing import Final

from bridge.brokers.contract import Broker
from bridge.errors import SettingsError
from bridge.settings import SinkSettings
from bridge.settings.installed import points

GROUP: Final = "pgbridge.brokers"


def broker_of(settings: SinkSettings) -> Broker:
    """The broker of this `type`. Raises SettingsError when none of that type is installed."""
    for point in points(GROUP).select(name=settings.type):
        broker: Broker = point.load()
        return broker
    raise SettingsError(f"{settings.key('type')}: no broker of type {settings.type!r} is installed")
