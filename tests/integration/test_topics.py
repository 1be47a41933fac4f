"""A topic is matched in SQL where the log is read, and in Python elsewhere: both must say the same."""

import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.event import matches

WORDS = st.one_of(
    st.sampled_from(
        [
            "*",
            "#",
            "a",
            "b",
            "",
            "%",
            "_",
            "*a",
            "#a",
            "a#",
            "Stock Level",
            ".",
            "\\",
            "(x",
            "[^",
            "$",
            "{2}",
            "+?",
            "a|b",
            "\n",
        ]
    ),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00."), max_size=4),
)
TOPICS = st.lists(WORDS, min_size=1, max_size=4).map(".".join).filter(bool)


@given(patterns=st.lists(TOPICS, min_size=1, max_size=4), topics=st.lists(TOPICS, min_size=1, max_size=20))
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_pattern_takes_the_same_topics_in_sql_and_in_python(
    bridge_database: str, patterns: list[str], topics: list[str]
) -> None:
    with psycopg.connect(bridge_database) as connection:
        rows = connection.execute(
            "select bridge.takes(topic, test.likes, test.regex), '.' || topic ~ bridge.topic_regex(%(patterns)s) "
            "from bridge.topic_test(%(patterns)s) as test, unnest(%(topics)s::text[]) with ordinality as t (topic, n) "
            "order by n",
            {"patterns": patterns, "topics": topics},
        ).fetchall()
    expected = [any(matches(pattern, topic) for pattern in patterns) for topic in topics]
    assert rows == list(zip(expected, expected, strict=True))
