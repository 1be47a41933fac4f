"""`InOrder`: parallel across keys, one after the other within a key, whatever is settled and taken back."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from bridge.brokers.order import InOrder


@dataclass(frozen=True)
class Delivery:
    key: str
    number: int


def filled(*keys: str) -> tuple[InOrder[Delivery], list[Delivery]]:
    hand: InOrder[Delivery] = InOrder()
    deliveries = [Delivery(key, number) for number, key in enumerate(keys)]
    for delivery in deliveries:
        hand.add(delivery)
    return hand, deliveries


def test_without_a_key_nothing_waits() -> None:
    hand, deliveries = filled("", "", "")
    assert [hand.hand_out() for _ in range(3)] == deliveries
    assert not hand
    assert hand.behind == 0


def test_of_a_key_the_next_is_ready_once_the_one_before_is_settled() -> None:
    hand, (first, second, other) = filled("a", "a", "b")
    assert [hand.hand_out(), hand.hand_out()] == [first, other]
    assert not hand
    assert hand.behind == 1
    hand.settled(other)
    assert not hand
    hand.settled(first)
    assert hand.hand_out() == second


def test_what_is_taken_back_takes_along_what_waits_behind_it() -> None:
    hand, (first, second, other, third) = filled("a", "a", "b", "a")
    hand.hand_out()
    assert hand.line_of(first) == [first, second, third]
    assert hand.take_back(first) == [first, second, third]
    assert hand.line_of(first) == [first]
    assert hand.hand_out() == other
    again = Delivery("a", 9)
    hand.add(again)
    assert hand.hand_out() == again


def test_what_is_handed_out_again_comes_before_what_waits_behind_it() -> None:
    hand, (first, second) = filled("a", "a")
    assert hand.hand_out() == first
    hand.again(first)
    assert hand.behind == 1
    assert hand.hand_out() == first
    assert not hand
    hand.settled(first)
    assert hand.hand_out() == second


def test_a_stop_takes_back_all_but_what_waits_for_one_in_hand() -> None:
    hand, (first, behind, b, b2, none) = filled("a", "a", "b", "b", "")
    assert hand.hand_out() == first
    assert hand.take_back_ready() == [b, b2, none]
    assert not hand
    assert hand.behind == 1
    hand.settled(first)
    assert hand.take_back_ready() == [behind]


def test_to_settle_what_is_not_first_of_its_key_changes_nothing() -> None:
    hand, (first, second) = filled("a", "a")
    hand.settled(second)
    hand.settled(Delivery("unknown", 1))
    assert hand.hand_out() == first
    assert not hand
    assert hand.take_back(Delivery("unknown", 1)) == [Delivery("unknown", 1)]


@given(
    st.lists(st.tuples(st.sampled_from(["add", "out", "settle", "back"]), st.sampled_from(["", "a", "b"])), max_size=60)
)
def test_no_delivery_overtakes_another_of_its_key_and_none_is_lost(steps: list[tuple[str, str]]) -> None:
    hand: InOrder[Delivery] = InOrder()
    inside: list[Delivery] = []
    out: list[Delivery] = []
    for number, (step, key) in enumerate(steps):
        if step == "add":
            inside.append(Delivery(key, number))
            hand.add(inside[-1])
        elif step == "out" and hand:
            given_out = hand.hand_out()
            out.append(given_out)
            inside.remove(given_out)
            assert not any(each.key and each.key == given_out.key for each in out[:-1])
            assert not any(each.key and each.key == given_out.key and each.number < given_out.number for each in inside)
        elif step == "settle" and out:
            hand.settled(out.pop(0))
        elif step == "back" and out:
            returned = hand.take_back(out.pop(0))
            assert returned == sorted(returned, key=lambda each: each.number)
            inside = [each for each in inside if each not in returned]
    while out or hand:
        if hand:
            delivery = hand.hand_out()
            inside.remove(delivery)
            out.append(delivery)
        else:
            hand.settled(out.pop(0))
    assert inside == []
