"""Topic patterns as in AMQP, and the routing table."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.event import matches, overlap
from bridge.routes import Routes


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("#", "anything at all", True),
        ("#.c", "a.b.c", True),
        ("#.c", "c", True),
        ("a.#.c", "a.c", True),
        ("a.#.c", "a.b.b.c", True),
        ("a.#.c", "a.b.b", False),
        ("*.*", "a.b", True),
        ("Stock Level", "Stock Level", True),
    ],
)
def test_patterns_match_as_amqp_has_it(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected


def test_a_topic_of_many_words_is_matched_in_no_time() -> None:
    topic = ".".join(["a"] * 5_000)
    assert not matches("#.#.#.#.b", topic)
    assert matches("#.a.#.a.#", topic)
    assert matches("a.#", topic)


def test_every_route_that_matches_applies_and_each_sink_once() -> None:
    routes = Routes([("shop.#", "a"), ("shop.order.*", "b"), ("#.placed", "a")])
    assert routes.sinks_of("shop.order.placed") == ("a", "b")
    assert routes.sinks_of("shop.stock") == ("a",)
    assert routes.sinks_of("other") == ()


def test_more_topics_than_the_cache_holds_are_still_routed() -> None:
    routes = Routes([("shop.#", "a")])
    assert all(routes.sinks_of(f"shop.{n}") == ("a",) for n in range(70_000))


PATTERNS = st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=4).map(".".join)
TOPICS = [".".join(words) for length in range(1, 8) for words in itertools.product("abc", repeat=length)]


@given(PATTERNS, PATTERNS)
def test_patterns_overlap_where_some_topic_is_taken_by_both(one: str, other: str) -> None:
    assert overlap(one, other) is any(matches(one, topic) and matches(other, topic) for topic in TOPICS)
