"""What is wrong, by a look of `status.py`, in words and with its mend: what `pgbridge status` prints in red, and what
stands at the top of the console."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bridge.postgres.status import Bridge, Guards, SinkPosition, Status, Waiting, WorkerStatus
from bridge.process.terminal import age

_LONG_TRANSACTION: Final = 3600.0
"""Seconds from which on a transaction is one."""
_OVERDUE: Final = 5.0
"""Seconds from which on a scheduled event that is due, and not in the log, is one."""
_FULL_QUEUE: Final = 0.5
"""Used part of the NOTIFY queue, 0 to 1, from which on it is one."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    subject: str
    """The heading under which `pgbridge status` tells of it: ``bridge shop``, ``worker payments``, ``database``."""
    field: str
    """The line's name there: ``leader``, ``dead letters``, ``problem``."""
    words: str
    mend: str
    sink: str | None = None
    """The sink whose problem it is; empty for what no route takes."""


def problems(status: Status, name: str) -> Iterator[Problem]:
    """Those of a look, the gravest first; `name` is this bridge's."""
    if all(bridge.name != name for bridge in status.bridges):
        yield Problem(f"bridge {name}", "leader", "it has not run on this database yet", _START)
    for bridge in status.bridges:
        yield from _of_bridge(bridge, status)
    for worker in status.workers:
        yield from _of_worker(worker)
    yield from _of_guards(status.guards)
    yield from _of_scheduled(status)


_START: Final = "Start one: pgbridge run, or systemctl start pgbridge"


def leader_words(bridge: Bridge, status: Status) -> str:
    """Who leads, for how long, and how many stand by."""
    if bridge.leader is None:
        return "nobody; no bridge of this name is running"
    since = age((status.at - bridge.leader_since).total_seconds()) if bridge.leader_since else ""
    stand = "stands" if bridge.standing_by == 1 else "stand"
    beside = f"; {bridge.standing_by} {stand} by" if bridge.standing_by else ""
    return f"{bridge.leader}, for {since}{beside}"


def _of_bridge(bridge: Bridge, status: Status) -> Iterator[Problem]:
    subject = f"bridge {bridge.name}"
    if bridge.leader is None:
        yield Problem(subject, "leader", leader_words(bridge, status), _START)
    for position in bridge.sinks:
        if position.problem is not None:
            mend = "What each reason means, and its mend: docs/troubleshooting.md"
            yield Problem(subject, "problem", problem_words(position), mend, position.sink)
    if bridge.dead_letters:
        mend = "Look at them: pgbridge dead list --group. Then replay or discard them"
        yield Problem(subject, "dead letters", str(bridge.dead_letters), mend)


def problem_words(position: SinkPosition) -> str:
    """Why a sink is behind, and since when."""
    return f"for {age(position.problem_seconds)}: {position.problem}"


def _of_worker(worker: WorkerStatus) -> Iterator[Problem]:
    subject = f"worker {worker.worker}"
    if worker.dead_letters:
        mend = f"Look at them: pgbridge dead list --worker {worker.worker}. Then replay or discard them"
        yield Problem(subject, "dead letters", str(worker.dead_letters), mend)
    if worker.held_keys:
        mend = "Replay or discard the first dead letter of each key: the later ones run behind it"
        yield Problem(subject, "held keys", str(worker.held_keys), mend)


def is_long(guards: Guards) -> bool:
    """Whether the oldest transaction is a problem."""
    return (guards.oldest_transaction_seconds or 0.0) > _LONG_TRANSACTION


def is_filling(guards: Guards) -> bool:
    """Whether the queue of NOTIFY is a problem."""
    return guards.notification_queue_usage > _FULL_QUEUE


def is_overdue(waiting: Waiting, status: Status) -> bool:
    """Whether scheduled events do not come."""
    return waiting.next_at is not None and (status.at - waiting.next_at).total_seconds() > _OVERDUE


def transaction_words(guards: Guards) -> str:
    """Who holds the oldest transaction, as far as that is known."""
    oldest = "-"
    if guards.oldest_transaction_seconds is not None:
        oldest = f"{age(guards.oldest_transaction_seconds)}: {guards.oldest_transaction}"
    if guards.sees_sessions:
        return oldest
    # A prepared transaction is seen by everybody.
    seen = "" if oldest == "-" else f"{oldest}; "
    return f"{seen}those of others are not known: grant pg_read_all_stats to the owner of schema bridge"


def queue_words(guards: Guards) -> str:
    """How full the queue of NOTIFY is."""
    return f"{guards.notification_queue_usage:.1%} used"


def held_back_words(bridge: str) -> str:
    """Why nothing is pruned."""
    return f"bridge {bridge} has not settled it; run it again, or forget it (docs/operations.md)"


def scheduled_words(status: Status) -> str:
    """How many events wait for their time, and for how long the first does."""
    waiting = status.scheduled
    wait = (waiting.next_at - status.at).total_seconds() if waiting.next_at is not None else 0.0
    due = f"in {age(wait)}" if wait >= 0 else f"overdue for {age(-wait)}"
    return f"{'' if waiting.exact else 'at least '}{waiting.events} events, the next {due}"


def _of_guards(guards: Guards) -> Iterator[Problem]:
    if is_long(guards):
        mend = "It stops vacuum and keeps gaps open: end it, or let it commit"
        yield Problem("database", "oldest transaction", transaction_words(guards), mend)
    if is_filling(guards):
        mend = "When it is full every NOTIFY fails: end the session that listens and does not read"
        yield Problem("database", "NOTIFY queue", queue_words(guards), mend)
    for bridge in guards.held_back_by:
        mend = "Until then nothing behind it is pruned: pgbridge cursor forget removes the position of what is gone"
        yield Problem("database", "held back", held_back_words(bridge), mend)


def _of_scheduled(status: Status) -> Iterator[Problem]:
    if status.scheduled.events and is_overdue(status.scheduled, status):
        mend = "The leader moves them into the log: see that one leads, and that no transaction holds them"
        yield Problem("database", "scheduled", scheduled_words(status), mend)
