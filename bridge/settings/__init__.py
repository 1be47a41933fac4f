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
    SinkSettings,
    TlsSettings,
    WorkerSettings,
)

__all__ = [
    "ChannelsSettings",
    "ObserveSettings",
    "OutboxSettings",
    "PostgresSettings",
    "RelaySettings",
    "RouteSettings",
    "Settings",
    "SinkSettings",
    "TlsSettings",
    "WorkerSettings",
    "load",
]
