"""The settings: one file, `bridge.toml`, for bridge and workers, overridden by environment and credentials.

Nothing else in the project reads configuration. `models` says what there is and how durations, sizes and secrets are
written, `load` where settings come from and what a mistake in them is called, `document` writes the pages about them.
"""

from bridge.settings.load import Process, find, load
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
    "Process",
    "RelaySettings",
    "RouteSettings",
    "Settings",
    "SinkSettings",
    "TlsSettings",
    "WorkerSettings",
    "find",
    "load",
]
