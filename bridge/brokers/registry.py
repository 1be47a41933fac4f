"""Finds a sink's class by the type that the settings name: the entry points of group ``pgbridge.sinks``."""

from importlib.metadata import entry_points
from typing import Protocol, cast

from bridge.brokers.contract import Queue, Sink, Subscription
from bridge.errors import SettingsError
from bridge.settings import SinkSettings


def build_sink(settings: SinkSettings) -> Sink:
    """The sink for these settings, not yet open. Raises SettingsError when none of that type is installed."""
    points = list(entry_points(group="pgbridge.sinks", name=settings.type))
    if not points:
        raise SettingsError(f"there is no sink of type {settings.type!r}")
    return cast(Sink, points[0].load()(settings))


class QueueClass(Protocol):
    """What an entry point of the group `pgbridge.queues` names."""

    def __call__(self, settings: SinkSettings, subscription: Subscription, /) -> Queue: ...


def queue_class(sink: str, settings: SinkSettings) -> QueueClass:
    """The class that consumes from a sink's broker. Raises SettingsError when there is none, or its package lacks."""
    kinds = {point.name: point for point in entry_points(group="pgbridge.queues")}
    if settings.type not in kinds:
        raise SettingsError(
            f"sinks.{sink}.type: workers cannot consume from {settings.type!r}; installed: {', '.join(sorted(kinds))}"
        )
    try:
        return cast("QueueClass", kinds[settings.type].load())
    except ImportError as error:
        raise SettingsError(
            f"sinks.{sink}.type: {settings.type!r} lacks the package {error.name!r}: "
            f"pip install 'pgbridge[{settings.type}]'"
        ) from None
