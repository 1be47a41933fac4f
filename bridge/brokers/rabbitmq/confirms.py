"""Counts which publishes the broker has confirmed: ranges of delivery tags, no object for a message.

A confirm costs constant time: in order, it moves a batch's floor; out of order, it is kept in a set until the floor
reaches it.
"""

from asyncio import Future
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Final, Generic, Protocol, TypeVar

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Outcome, Refused, Unknown

NACKED: Final = Refused("RabbitMQ refused the message (basic.nack): a queue is full or could not store it")

_first = attrgetter("first")


class Publishable(Protocol):
    """What a publisher knows of a message: an event has it, and so has a copy of one."""

    @property
    def id(self) -> str: ...

    @property
    def topic(self) -> str:
        """The routing key."""

    @property
    def payload(self) -> bytes: ...


M = TypeVar("M", bound=Publishable)


class Batch(Generic[M]):
    """The events of one `publish`, and how far they have come.

    A *place* counts the events that were written: place p has the delivery tag `first` + p.
    """

    __slots__ = (
        "_order",
        "_places",
        "answers",
        "done",
        "early",
        "events",
        "first",
        "floor",
        "next",
        "sealed",
        "written",
    )

    def __init__(self, events: Sequence[M], done: "Future[None]") -> None:
        self.events = events
        self.done = done
        """Done once every outcome is known."""
        self.next = 0
        """The first event that is not yet handled by the writer."""
        self.first = 0
        """The delivery tag of place 0."""
        self.written = 0
        self.floor = 0
        """All places below are settled."""
        self.early: set[int] = set()
        """Settled places above the floor."""
        self.sealed = False
        """No more events will be written."""
        self.answers: dict[int, Outcome] = {}
        """The outcomes that are not Confirmed, by index of the event."""
        self._order: list[int] | None = None
        self._places: dict[tuple[str, str], list[int]] = {}

    def index(self, place: int) -> int:
        """The event that stands at a place."""
        return place if self._order is None else self._order[place]

    def wrote(self, indexes: range, refused: Mapping[int, Never]) -> None:
        """The writer has handled these events: sent them, or refused some."""
        if refused and self._order is None:
            self._order = list(range(indexes.start))
        if self._order is not None:
            self._order += [index for index in indexes if index not in refused]
        self.answers.update(refused)
        self.written += len(indexes) - len(refused)
        self.next = indexes.stop
        self._places = {}

    def is_open(self, place: int) -> bool:
        """Whether a place awaits its confirm."""
        return self.floor <= place < self.written and place not in self.early

    def open_places(self) -> Iterable[int]:
        """The places that await their confirms."""
        return (place for place in range(self.floor, self.written) if place not in self.early)

    def places_of(self, key: tuple[str, str]) -> list[int]:
        """Where the event with this id and topic stands; more than one place when it was given twice."""
        if not self._places:
            for place in range(self.written):
                event = self.events[self.index(place)]
                self._places.setdefault((event.id, event.topic), []).append(place)
        return self._places.get(key, [])

    @property
    def complete(self) -> bool:
        return self.sealed and self.floor == self.written

    def settle(self, place: int) -> None:
        """One place is confirmed or refused."""
        early = self.early
        if place > self.floor:
            early.add(place)
        elif place == self.floor:
            self.floor += 1
            while early and self.floor in early:
                early.remove(self.floor)
                self.floor += 1

    def settle_below(self, end: int) -> None:
        """All places below `end` are confirmed or refused."""
        if self.early:
            for place in range(self.floor, end):
                self.early.discard(place)
        self.floor = max(self.floor, end)
        while self.early and self.floor in self.early:
            self.early.remove(self.floor)
            self.floor += 1

    def outcomes(self) -> list[Outcome]:
        """One outcome for each event. Only when `done`."""
        outcomes: list[Outcome] = [CONFIRMED] * len(self.events)
        for index, outcome in self.answers.items():
            outcomes[index] = outcome
        return outcomes

    def refuse_open(self, judge: Callable[[M], Never | None]) -> int:
        """Answers for what awaits its confirm, where `judge` has a failure for it. How many it had."""
        refused = 0
        for place in self.open_places():
            index = self.index(place)
            failure = judge(self.events[index])
            if failure is not None:
                self.answers[index] = failure
                refused += 1
        return refused

    def give_up(self, written: Unknown, unwritten: NotSent) -> None:
        """Answers for everything that is still open."""
        for place in self.open_places():
            self.answers.setdefault(self.index(place), written)
        for index in range(self.next, len(self.events)):
            self.answers[index] = unwritten
        self.sealed = True
        self.finish()

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class UnconfirmedBatches(Generic[M]):
    """The batches of one channel whose confirms are awaited, in the order of their tags.

    A batch whose call was cancelled stays until its confirms come, so that a return of one of its messages is not taken
    for that of a later copy.
    """

    def __init__(self) -> None:
        self.batches: list[Batch[M]] = []
        self._next_tag = 1
        self._contested: dict[tuple[str, str], _Contest[M]] = {}

    def wrote(self, batch: Batch[M], indexes: range, refused: Mapping[int, Never]) -> None:
        """The writer has handled these events of a batch. A batch is written whole before the next one begins."""
        before = batch.written
        batch.wrote(indexes, refused)
        if batch.written and not before:
            batch.first = self._next_tag
            self.batches.append(batch)
        self._next_tag += batch.written - before

    def seal(self, batch: Batch[M]) -> None:
        """Nothing more of this batch will be written."""
        batch.sealed = True
        if batch.complete:
            self._close(batch)

    def settled(self, tag: int, multiple: bool, nacked: bool) -> None:
        """A confirm: basic.ack, or basic.nack; `multiple` settles all tags up to this one. Tag 0 means all so far."""
        if multiple:
            self._settle_through(tag or self._next_tag - 1, nacked)
            return
        batches = self.batches
        if not batches:
            return
        batch = batches[0]
        place = tag - batch.first
        if place >= batch.written:
            batch = batches[bisect_right(batches, tag, key=_first) - 1]
            place = tag - batch.first
        if not batch.is_open(place):
            return
        if nacked:
            batch.answers[batch.index(place)] = NACKED
        batch.settle(place)
        if batch.sealed and batch.floor == batch.written:
            self._close(batch)

    def _settle_through(self, tag: int, nacked: bool) -> None:
        for batch in self.batches[: bisect_right(self.batches, tag, key=_first)]:
            end = min(tag - batch.first + 1, batch.written)
            if nacked:
                for place in batch.open_places():
                    if place < end:
                        batch.answers[batch.index(place)] = NACKED
            batch.settle_below(end)
            if batch.complete:
                self._close(batch)

    def _close(self, batch: Batch[M]) -> None:
        if batch in self.batches:
            self.batches.remove(batch)
        if self._contested:
            self._contested = {key: contest for key, contest in self._contested.items() if contest.is_open}
        batch.finish()

    def returned(self, event_id: str, topic: str, failure: Never) -> None:
        """A message came back; its ack follows.

        A return names no delivery tag. When several copies of the event are on the way it is not known which one
        came back: all of them are Unknown, unless as many returns come as there are copies.
        """
        key = (event_id, topic)
        contest = self._contested.setdefault(key, _Contest())
        contest.returns += 1
        contest.copies.update(
            (batch, place) for batch in self.batches for place in batch.places_of(key) if batch.is_open(place)
        )
        certain = contest.returns >= len(contest.copies)
        unclear = Unknown(f"another copy of this event was on the way, and one came back: {failure.reason}")
        for batch, place in contest.copies:
            batch.answers[batch.index(place)] = failure if certain else unclear

    def outstanding(self) -> int:
        """How many messages await their confirms."""
        return sum(batch.written - batch.floor - len(batch.early) for batch in self.batches)

    def give_up(self, written: Unknown, unwritten: NotSent) -> None:
        """The channel is gone: answers for everything that is still open."""
        batches, self.batches = self.batches, []
        for batch in batches:
            batch.give_up(written, unwritten)


class _Contest(Generic[M]):
    """Copies of one event that were on the way when returns came."""

    def __init__(self) -> None:
        self.copies: set[tuple[Batch[M], int]] = set()
        self.returns = 0

    @property
    def is_open(self) -> bool:
        return any(batch.is_open(place) for batch, place in self.copies)
