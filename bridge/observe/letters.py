"""A dead letter, wherever it stands; shared by the outbox's and the workers' side of `pgbridge dead`."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

Verdict = Literal["keep", "replay", "discard"]


@dataclass(frozen=True, slots=True)
class Letter:
    """An event that was given up, and why."""

    id: str
    """``outbox:<number>``, or ``<worker>:<event id>``; a message that is no event has another id behind the colon."""
    box: str
    """``outbox``, or the worker's name."""
    event_id: str | None
    topic: str | None
    """Event id and topic are None for a message that is no event."""
    key: str | None
    sink: str | None
    """The sink that refused it (None: no route took it), or whose broker holds the worker's queue."""
    code: str
    reason: str
    attempts: int
    failed_at: datetime | None
    payload: bytes | None = None
    """None where it was not asked for."""
    content_type: str | None = None
    created_at: datetime | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    trace: str = ""
    """The worker's traceback, where there is one."""


Decide = Callable[[Letter], Awaitable[Verdict]]


class LetterBox(Protocol):
    """The dead letters of one worker. An entry point of the group ``pgbridge.dead_letters`` gives them by name."""

    async def walk(self, decide: Decide) -> None:
        """Shows `decide` every letter that stands there now, once; does what it says, and leaves the others.

        A replayed letter is first confirmed in the worker's queue, and then removed: after a crash in between it may
        stand in both. Raises BrokerUnavailableError, TopologyError, RefusedError.
        """
