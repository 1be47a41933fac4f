"""What became of every event at the workers that take it, beside what had to become of it.

Each is handled, with one reply; or it is given up, and stands with its failure in its worker's dead letters. Nothing is
in hand when the workers have stopped, and the queues hold nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg

from bridge.brokers.contract import Letter
from tests.faults.fates import MAX_ATTEMPTS, Fate
from tests.faults.load import MOVED, PLACED, PROBED, Ledger

WORKERS: Final = {"count": (PLACED, MOVED, PROBED), "ponder": (MOVED, PROBED), "book": (PLACED, PROBED)}
"""By name, the topics that each takes."""
ORDERED: Final = "book"
"""The one that handles the events of a key one after the other."""

Task = tuple[str, str]
"""A worker and an event that it takes."""


def tasks(ledger: Ledger) -> dict[Task, Fate]:
    """All that the workers are to do, and how each must end."""
    return {
        (worker, event_id): event.fate
        for worker, topics in WORKERS.items()
        for event_id, event in ledger.committed.items()
        if event.topic in topics
    }


def ended(dsn: str) -> set[Task]:
    """What the inbox knows to be handled, or given up with its dead letter taken."""
    with psycopg.connect(dsn, connect_timeout=5) as connection:
        found = connection.execute(
            "select worker, event_id::text from bridge.inbox"
            " where claim is null and failure is null and (finished_at is not null or ended_at is not null)"
        )
        return {(worker, event_id) for worker, event_id in found.fetchall()}


@dataclass
class Outcomes:
    """The counts, and all that is wrong, one by one."""

    replies: int = 0
    replies_wanted: int = 0
    letters: int = 0
    """Events in the dead letters of a worker."""
    letters_wanted: int = 0
    repeated_letters: int = 0
    """Dead letters beyond one for an event: the broker took one, and its answer was lost."""
    shipped: int = 0
    """Events with an effect outside of the database."""
    shipped_again: int = 0
    """Effects beyond one for an event, under the same key."""
    unnoted_letters: int = 0
    """Dead letters that the broker took in the moment in which their worker was killed, which the inbox still owes."""
    overtaken: int = 0
    """Replies of the ordered worker that came before one of an earlier event of their key."""
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """What is in hand or owed although the workers have stopped."""


def outcomes(dsn: str, ledger: Ledger, letters: Mapping[str, Sequence[Letter]], notes: Path) -> Outcomes:
    """`letters`: those of each worker. To be called once the workers have stopped."""
    wanted = tasks(ledger)
    found = Outcomes()
    _count_replies(dsn, wanted, found)
    _look_at_order(dsn, ledger, found)
    in_letters = {(worker, str(letter.event_id)) for worker, each in letters.items() for letter in each}
    _count_letters(wanted, letters, found)
    _count_shipments(wanted, notes, found)
    _look_into_inbox(dsn, wanted, in_letters, found)
    return found


def _count_replies(dsn: str, wanted: Mapping[Task, Fate], found: Outcomes) -> None:
    with psycopg.connect(dsn, connect_timeout=5) as connection:
        rows = connection.execute("select worker, event_id::text from shop.reply").fetchall()
    replies = Counter((worker, event_id) for worker, event_id in rows)
    handled = {task for task, fate in wanted.items() if fate.code is None}
    found.replies, found.replies_wanted = replies.total(), len(handled)
    for task in handled | replies.keys():
        if replies[task] != (task in handled):
            found.wrong.append(f"{_named(task, wanted)}: {replies[task]} replies")


def _look_at_order(dsn: str, ledger: Ledger, found: Outcomes) -> None:
    with psycopg.connect(dsn, connect_timeout=5) as connection:
        rows = connection.execute("select event_id::text from shop.reply where worker = %s order by n", (ORDERED,))
        latest: dict[str, int] = {}
        for (event_id,) in rows.fetchall():
            event = ledger.committed.get(event_id)
            if event is None:
                continue
            if event.number < latest.get(event.key, 0):
                found.overtaken += 1
                found.wrong.append(f"{ORDERED}: {event_id}, number {event.number} of {event.key}, was overtaken")
            latest[event.key] = max(event.number, latest.get(event.key, 0))


def _count_letters(wanted: Mapping[Task, Fate], letters: Mapping[str, Sequence[Letter]], found: Outcomes) -> None:
    of_task: defaultdict[Task, list[Letter]] = defaultdict(list)
    for worker, each in letters.items():
        for letter in each:
            of_task[worker, str(letter.event_id)].append(letter)
    given_up = {task: fate for task, fate in wanted.items() if fate.code is not None}
    found.letters, found.letters_wanted = len(of_task), len(given_up)
    found.repeated_letters = sum(len(each) - 1 for each in of_task.values())
    found.wrong += [f"{_named(task, wanted)}: no dead letter" for task in given_up.keys() - of_task.keys()]
    for task, each in of_task.items():
        fate = given_up.get(task)
        found.wrong += [
            f"{_named(task, wanted)}: dead letter {letter.code} after {letter.attempts} attempts: {letter.reason}"
            for letter in each
            if fate is None or not _is_right(fate, letter)
        ]


def _is_right(fate: Fate, letter: Letter) -> bool:
    if letter.code == fate.code == "rejected":
        # Attempts before that died with their process.
        return 1 <= letter.attempts <= MAX_ATTEMPTS
    died = letter.code == "attempts_exhausted" and "process died" in letter.reason
    return letter.attempts == MAX_ATTEMPTS and (letter.code == fate.code or died)


def _count_shipments(wanted: Mapping[Task, Fate], notes: Path, found: Outcomes) -> None:
    keys: defaultdict[Task, Counter[str]] = defaultdict(Counter)
    for line in (notes / "shipped").read_text().splitlines():
        worker, event_id, key = line.split(" ")
        keys[worker, event_id][key] += 1
    shipping = {task for task, fate in wanted.items() if fate.ships}
    found.shipped = len(keys)
    found.shipped_again = sum(each.total() - 1 for each in keys.values())
    for task in shipping | keys.keys():
        right = {":".join((*task, "ship"))} if task in shipping else set()
        # One whose attempts all died before their effect has none.
        if keys[task].keys() != right and not (wanted[task].code and not keys[task]):
            found.wrong.append(f"{_named(task, wanted)}: shipped under the keys {dict(keys[task])}")


def _look_into_inbox(dsn: str, wanted: Mapping[Task, Fate], in_letters: set[Task], found: Outcomes) -> None:
    with psycopg.connect(dsn, connect_timeout=5) as connection:
        rows = connection.execute(
            "select worker, event_id::text, attempts, claim, failure ->> 'code' from bridge.inbox"
            " where claim is not null or failure is not null or (finished_at is null and ended_at is null)"
        ).fetchall()
    for worker, event_id, attempts, claim, failure in rows:
        task = (worker, event_id)
        if failure is not None and task in in_letters:
            found.unnoted_letters += 1
            continue
        how = "claimed" if claim is not None else f"owed as {failure}" if failure is not None else "begun"
        found.left.append(f"{_named(task, wanted)}: {how} in the inbox after {attempts} attempts")


def _named(task: Task, wanted: Mapping[Task, Fate]) -> str:
    worker, event_id = task
    return f"{worker}: {event_id} ({wanted[task].name if task in wanted else 'not its own'})"
