"""What `pgbridge init` asks a broker for: an account for each kind of process, with no more rights than it needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

SINK: Final = "events"
"""The name of the sink, under which the settings keep what is written here."""

Process = Literal["bridge", "workers", "operator"]
"""`bridge` publishes, `workers` consume and put away what they give up, `operator` declares, and tends dead letters."""


@dataclass(frozen=True, slots=True)
class Installation:
    """What is to be there."""

    bridge: str
    """The name of the bridge, with which the names of accounts begin."""
    workers: Sequence[str]
    place: str
    """Where the broker is, in its own words, without a login."""

    @property
    def processes(self) -> Sequence[Process]:
        """Those that need an account."""
        return ("bridge", "workers", "operator") if self.workers else ("bridge", "operator")

    def account(self, process: Process) -> str:
        """The name of a process's account."""
        return f"{self.bridge}_{process}"


@dataclass(frozen=True, slots=True)
class Accounts:
    """What is to be written down."""

    settings: Mapping[str, str]
    """What the settings say of the sink beside its `type`; no secret is among it."""
    secrets: Mapping[Process, Mapping[str, str]]
    """By process, the sink's settings that only it may know."""
    file: str
    """The name of the file with which the broker's administrator makes the accounts."""
    text: str
    """What it holds."""
    how: str
    """What the administrator does with it; ``{file}`` is where it is."""
    stays: bool = False
    """Whether the broker needs it further on."""
