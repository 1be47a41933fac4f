"""What lies in the boxes of dead letters, as the console knows it.

To look into a queue of RabbitMQ or Pub/Sub is to take its letters in hand, and to give them back; who else looks
meanwhile sees the others only. So the console looks seldom, and not while it replays or discards; it looks at some
letters and no more, for some seconds and no longer, and says which boxes it has not seen to their end.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

from bridge.brokers.contract import DeadLetters, Letter, Verdict
from bridge.commands.dead_groups import group_id
from bridge.commands.dead_letters import Choice, boxes_of
from bridge.commands.dead_outbox import OUTBOX, list_letters, read_letters
from bridge.console.database import Database
from bridge.console.recent import Recent
from bridge.errors import PgbridgeError
from bridge.postgres.events import CONTENT
from bridge.process.tasks import raise_if_cancelled
from bridge.settings import Settings

LETTERS: Final = 10_000
"""Of one box, that are looked at at most."""
SECONDS: Final = 10.0
"""For which one box is looked into at most."""
_KEPT: Final = 30.0
"""Seconds for which what was seen is good."""
_REST: Final = 20
"""So many times as long as a look took, there is none: a box is in hand for a twentieth of the time at most."""
_PATIENCE: Final = 3.0
"""Seconds for which a page waits for a look, before it is shown without those boxes that have not answered."""
_AT_ONCE: Final = 4
"""Boxes that are looked into at once; each takes a connection to its broker."""


class _Enough(Exception):  # noqa: N818 - named for what it says
    """Ends a walk."""


@dataclass(frozen=True, slots=True)
class Sorted:
    """A letter, without what is heavy in it, and its group."""

    letter: Letter
    group: str


@dataclass(frozen=True, slots=True)
class Box:
    """What was seen of one box."""

    name: str
    at: datetime
    letters: Sequence[Sorted] = ()
    problem: str | None = None
    """Why it could not be looked into, with its mend."""
    is_cut: bool = False
    """Whether there are letters that were not looked at."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of all boxes."""

    boxes: Sequence[Box]
    waiting: Sequence[str]
    """Boxes that have not answered yet."""
    rests: bool = False
    """Whether there is no newer look because somebody replays or discards."""

    @property
    def letters(self) -> Iterator[Sorted]:
        """Of all boxes."""
        return (each for box in self.boxes for each in box.letters)

    @property
    def at(self) -> datetime | None:
        """When the oldest part of it was seen."""
        return min((box.at for box in self.boxes), default=None)


@dataclass(frozen=True, slots=True)
class Found:
    """One letter with its payload, as far as that is shown; or why there is none."""

    letter: Letter | None = None
    is_whole: bool = True
    problem: str | None = None


class DeadBoxes:
    """Looks when it is asked to."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._boxes: dict[str, DeadLetters] = {}
        """Of the workers whose broker keeps dead letters."""
        self._seen: dict[str, tuple[float, Box]] = {}
        """By box, with the time until when it is good."""
        for name in settings.workers:
            try:
                self._boxes |= boxes_of(settings, Choice(workers=(name,)))
            except PgbridgeError as error:  # nothing mends it but other settings
                self._seen[name] = (math.inf, Box(name, datetime.now(UTC), problem=str(error)))
        self._looking: asyncio.Task[None] | None = None
        self._in_hand = {name: asyncio.Lock() for name in (OUTBOX, *settings.workers)}
        """Held by who looks into the box, or acts on it."""
        self._acts = 0
        """Actions under way."""
        self._letters = Recent()
        self.looks = 0
        """How often boxes were looked into."""

    # All letters

    async def look(self) -> Look:
        """What is known, by looks that are not old; by the last ones while somebody replays or discards."""
        now = time.monotonic()
        due = [name for name in (OUTBOX, *self._boxes) if name not in self._seen or self._seen[name][0] <= now]
        if self._looking is None and due and not self._acts:
            self._looking = asyncio.create_task(self._look_into(due))
        if (looking := self._looking) is not None:
            # Whoever waits may leave; the others want the answer.
            await asyncio.wait([looking], timeout=_PATIENCE)
            if looking.done() and not looking.cancelled():
                looking.result()
        names = (OUTBOX, *(name for name in self._settings.workers if name in self._boxes or name in self._seen))
        return Look(
            [self._seen[name][1] for name in names if name in self._seen],
            [name for name in names if name not in self._seen],
            bool(self._acts),
        )

    async def _look_into(self, names: Iterable[str]) -> None:
        places = asyncio.Semaphore(_AT_ONCE)

        async def look(name: str) -> None:
            async with places, self._in_hand[name]:
                began = time.monotonic()
                box = await (self._outbox() if name == OUTBOX else _walked(name, self._boxes[name]))
                now = time.monotonic()
                # What gave nothing to anybody's hand may be tried again soon.
                rest = _REST * (now - began) if box.problem is None else 0.0
                self._seen[name] = (now + max(_KEPT, rest), box)
                self.looks += 1

        try:
            async with asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(look(name))
        finally:
            self._looking = None

    async def _outbox(self) -> Box:
        at = datetime.now(UTC)
        try:
            async with self._database.connection() as connection:
                letters = await list_letters(connection, self._settings.name, LETTERS + 1)
        except PgbridgeError as error:
            return Box(OUTBOX, at, problem=str(error))
        found = await asyncio.to_thread(lambda: [_sorted(letter) for letter in letters[-LETTERS:]])
        return Box(OUTBOX, at, found, is_cut=len(letters) > LETTERS)

    # One letter

    async def find(self, id_: str) -> Found:
        """The letter with this id, if it is there."""
        if id_.startswith(f"{OUTBOX}:"):
            return await self._letters.get(id_, 0.0, partial(self._find_in_outbox, id_))
        if self._acts:
            return Found(problem="Dead letters are being replayed or discarded. It is looked for once that has ended")
        return await self._letters.get(id_, _KEPT, partial(self._find_in_queue, id_))

    async def _find_in_outbox(self, id_: str) -> Found:
        try:
            async with self._database.connection() as connection:
                letters = await read_letters(connection, self._settings.name, [id_])
        except PgbridgeError as error:
            return Found(problem=str(error))
        return _found(letters[0]) if letters else Found()

    async def _find_in_queue(self, id_: str) -> Found:
        name = id_.partition(":")[0]
        if name not in self._boxes:
            return Found()
        async with self._in_hand[name]:
            letters, problem, is_cut = await _walk(name, self._boxes[name], id_)
        if letters:
            return _found(letters[0])
        if is_cut:
            problem = f"it is not among those that the console looked at, for {SECONDS:g} s, and there are more"
        return Found(problem=problem)

    # Acting

    @asynccontextmanager
    async def acting_on(self, names: Iterable[str]) -> AsyncIterator[None]:
        """The body has these boxes to itself, all of them where it names none; what was known of them is forgotten."""
        wanted = set(names) or set(self._in_hand)
        self._acts += 1
        try:
            async with AsyncExitStack() as stack:
                for name in sorted(wanted & set(self._in_hand)):
                    await stack.enter_async_context(self._in_hand[name])
                yield
        finally:
            self._acts -= 1
            self.forget(wanted)

    def forget(self, names: Iterable[str]) -> None:
        """Has these boxes looked into anew."""
        self._letters = Recent()
        for name in names:
            if name == OUTBOX or name in self._boxes:
                self._seen.pop(name, None)

    async def close(self) -> None:
        """Ends a look that is under way; what it has in hand goes back."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)


async def _walked(name: str, box: DeadLetters) -> Box:
    at = datetime.now(UTC)
    letters, problem, is_cut = await _walk(name, box)
    return Box(name, at, [_sorted(letter) for letter in letters], problem, is_cut)


async def _walk(name: str, box: DeadLetters, wanted: str | None = None) -> tuple[list[Letter], str | None, bool]:
    """Letters without what is heavy in them, or the wanted one with all of it; why it was in vain; and whether there
    are more."""
    found: list[Letter] = []
    seen = 0

    async def see(letter: Letter) -> Verdict:
        nonlocal seen
        raise_if_cancelled()
        if seen >= LETTERS and wanted is None:
            raise _Enough
        seen += 1
        if wanted is None:
            found.append(_slim(letter))
        elif letter.id == wanted:
            found.append(letter)
            raise _Enough
        return "keep"

    try:
        async with asyncio.timeout(SECONDS):
            await box.walk(see)
    except _Enough:
        return found, None, wanted is None
    except TimeoutError:
        problem = f"its broker has not answered within {SECONDS:g} s; pgbridge check says what is in the way"
        return found, None if seen else problem, bool(seen)
    except PgbridgeError as error:
        return found, str(error), False
    return found, None, False


def _slim(letter: Letter) -> Letter:
    return replace(letter, payload=None, headers={}, trace="")


def _sorted(letter: Letter) -> Sorted:
    return Sorted(_slim(letter), group_id(letter))


def _found(letter: Letter) -> Found:
    text = (letter.payload or b"").decode(errors="replace")
    is_whole = len(text) <= CONTENT
    return Found(letter if is_whole else replace(letter, payload=text[:CONTENT].encode()), is_whole)
