"""`Succession`: whatever predecessors do meanwhile, it never says that everything is in hand while something is not."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from bridge.brokers.nats.succession import Succession


@dataclass
class Consumer:
    """A pinned consumer of JetStream, as a successor and the predecessors that still live see it."""

    unsettled: set[int]
    """What was delivered and is not acknowledged."""
    due: list[int] = field(default_factory=list)
    """Of that, what comes before anything new."""
    newest: int = 0

    def pull(self, count: int) -> list[tuple[int, bool]]:
        """So many sequence numbers, each with whether it had never been delivered before."""
        given_out = []
        for _ in range(count):
            if self.due:
                sequence = self.due.pop(0)
                given_out.append((sequence, False))
            elif self.newest < 40:
                self.newest += 1
                self.unsettled.add(self.newest)
                given_out.append((self.newest, True))
        return given_out

    def acknowledge(self, sequence: int) -> None:
        self.unsettled.discard(sequence)
        if sequence in self.due:
            self.due.remove(sequence)

    def expire(self, sequence: int) -> None:
        if sequence in self.unsettled and sequence not in self.due:
            self.due.append(sequence)


Step = tuple[str, int]

steps = st.lists(
    st.tuples(st.sampled_from(["ack", "expire", "pull", "look", "look"]), st.integers(0, 7)), min_size=1, max_size=40
)


@given(predecessors=st.integers(0, 8), expired=st.booleans(), steps=steps)
def test_everything_is_in_hand_when_it_says_so(predecessors: int, expired: bool, steps: list[Step]) -> None:
    old = set(range(1, predecessors + 1))
    consumer = Consumer(set(old), newest=predecessors)
    if expired and old:
        consumer.expire(1)
    succession: Succession[int] = Succession()
    for sequence, first in consumer.pull(1):
        succession.add(sequence, sequence, first=first)
    for step, number in [*steps, *[("expire", each) for each in old], *[("look", 7)] * 60]:
        if step == "ack" and number in old:  # a predecessor that still lives
            consumer.acknowledge(number)
        elif step == "expire":
            consumer.expire(number)
        elif step == "pull":
            for sequence, first in consumer.pull(number):
                succession.add(sequence, sequence, first=first)
        elif step == "look":
            verdict = succession.judge(len(consumer.unsettled))
            if verdict == "all":
                assert set(succession.in_order()) == consumer.unsettled
                assert succession.in_order() == sorted(consumer.unsettled)
                return
            if verdict == "unsure":
                for each in succession.begin_again(len(consumer.unsettled)):
                    consumer.expire(each)
            for sequence, first in consumer.pull(min(number, succession.room(3))):
                succession.add(sequence, sequence, first=first)
    raise AssertionError("it never ends")


def test_without_a_predecessor_one_look_is_enough() -> None:
    succession: Succession[str] = Succession()
    succession.add(7, "first", first=True)
    assert succession.judge(1) == "all"
    assert succession.in_order() == ["first"]


def test_what_was_settled_after_it_came_again_is_not_taken_for_what_is_missing() -> None:
    succession: Succession[str] = Succession()
    succession.add(1, "one", first=False)
    # Two were unsettled; the predecessor has acknowledged the first of them, and the second has not come yet.
    assert succession.judge(1) == "unsure"
    assert succession.begin_again(1) == ["one"]
    assert succession.judge(1) == "some"
    succession.add(2, "two", first=False)
    assert succession.judge(1) == "all"
    assert succession.in_order() == ["two"]


def test_what_predecessors_have_settled_meanwhile_is_in_hand_no_more() -> None:
    succession: Succession[str] = Succession()
    succession.add(1, "one", first=False)
    assert succession.judge(0) == "all"
    assert succession.in_order() == []


def test_a_message_that_comes_again_stands_for_the_one_before() -> None:
    succession: Succession[str] = Succession()
    assert succession.add(1, "one", first=True) is None
    assert succession.add(1, "one again", first=False) == "one"
    assert succession.in_order() == ["one again"]


def test_it_asks_for_the_missing_ones_while_they_come_and_for_one_while_only_new_ones_do() -> None:
    succession: Succession[int] = Succession()
    succession.add(1, 1, first=False)
    assert succession.judge(50) == "unsure"
    succession.begin_again(50)
    assert succession.room(10) == 50
    for number in range(100, 110):
        succession.add(number, number, first=True)
    assert succession.judge(60) == "some"
    assert succession.room(10) == 1
