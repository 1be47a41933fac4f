"""Rows of the log that `emit()` refuses, or that some broker cannot take: written by hand, or before the limits."""

from typing import NamedTuple


class Row(NamedTuple):
    """What is odd about a row; the rest is as usual."""

    topic: str | None = None
    key: str = ""
    headers: str = "{}"
    content_type: str = "application/json"
    created_at: str | None = None


def _headers(*texts: str) -> list[Row]:
    return [Row(headers=text) for text in texts]


POISON = [
    *_headers(
        '{"n": 1e5000}',
        '{"n": 1e131071}',
        '{"n": -1e-5000}',
        f'{{"deep": {"[" * 1500}{"]" * 1500}}}',
        f'{{"wide": [{",".join("0" for _ in range(20_000))}]}}',
        f'{{"long": "{"x" * 200_000}"}}',
        '{"none": null, "yes": true, "list": [1, {"a": "b"}]}',
        '{"CC": "a.key"}',
        '{"BCC": ["a.key", 1]}',
        '{"Status": "503", "Description": "No Responders"}',
        '{"Nats-Msg-Id": "the same", "Nats-Expected-Last-Sequence": "1"}',
        '{"Nats-TTL": "1s", "Nats-Rollup": "all"}',
        '{"content-type": "a/b", "Content-Type": "c/d"}',
        '{"cloudEvents_id": "1"}',
        '{"ce-id": "1", "ce-subject": "another"}',
        '{"x-pgbridge-reason": "none"}',
        '{"x-death": "1", "x-delivery-count": "7"}',
        '{"": "empty"}',
        '{"a b:c\\r\\nd": "1"}',
        '{"value": "line\\r\\nX-Other: 1\\r\\n\\r\\n"}',
        '{"ключ": "значение 😀"}',
        f'{{"{"n" * 300}": "1"}}',
        "[]",
        '"text"',
        "1e5000",
        "null",
    ),
    *(Row(key=key) for key in ("k" * 2000, "k" * 200_000, "a\tb\r\n\x01\x7f", "ключ 😀", "*.>#%")),
    *(Row(topic=topic) for topic in ("", ".", "a..b", "t" * 300, "*.>#", "with space\r\n", "тема.😀", "$JS.API.INFO")),
    *(Row(content_type=text) for text in ("", "c" * 300, "a/b\r\nX: 1", "тип")),
    *(
        Row(created_at=time)
        for time in ("infinity", "-infinity", "294276-12-31", "4713-01-01 BC", "0001-01-01", "1969-12-31", "9999-12-31")
    ),
]
"""Each is delivered or becomes a dead letter, and what follows it goes on."""
