"""The settings: one file, `bridge.toml`, for bridge and workers, overridden by environment and credentials.

Nothing else in the project reads configuration. `models` and `sinks` say what there is, `values` how durations, sizes
and secrets are written, `load` where they come from and how a mistake is told.
"""

from bridge.settings.load import load
from bridge.settings.models import (
    ChannelsSettings,
    ObserveSettings,
    OutboxSettings,
    PostgresSettings,
    RelaySettings,
    RouteSettings,
    Settings,
    WorkerSettings,
)
from bridge.settings.sinks import NatsSettings, PubSubSettings, RabbitMQSettings, SinkSettings, TlsSettings

__all__ = [
    "ChannelsSettings",
    "NatsSettings",
    "ObserveSettings",
    "OutboxSettings",
    "PostgresSettings",
    "PubSubSettings",
    "RabbitMQSettings",
    "RelaySettings",
    "RouteSettings",
    "Settings",
    "SinkSettings",
    "TlsSettings",
    "WorkerSettings",
    "load",
]
