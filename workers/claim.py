"""Whose an event is, as the inbox has it."""

from dataclasses import dataclass
from typing import Literal

from bridge.brokers.contract import Failure


class ClaimLostError(Exception):
    """Another process took the event over, because our session with PostgreSQL had ended; or runs it beside us, where
    we run it without a claim."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An event that is ours to handle."""

    worker: str
    event_id: str
    token: int | None
    """Of the session with which it lives and dies; None for an event that runs without a claim."""
    attempt: int
    """Which run of the handler this is, from 1."""
    key: str | None = None
    """What it holds if it is given up for good; None for nothing."""

    @property
    def fence(self) -> tuple[str, str, int | None, int]:
        """What says in SQL whose claim it is."""
        return (self.worker, self.event_id, self.token, self.attempt)


@dataclass(frozen=True, slots=True)
class NotNow:
    """An event that is not ours to handle: how it stands."""

    state: Literal["finished", "failed", "busy", "early", "alone"]
    """See the function inbox_claim()."""
    seconds: float = 0.0
    """Until it may run, where it is early."""
    failure: Failure | None = None
    """With which it was given up, where that is so."""
