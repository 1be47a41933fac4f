"""What becomes of an event before it is a webhook: the payload must arrive as it was written."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support.events import make_event
from workers import Reject
from workers.handler import Result
from workers.testing import run
from workers.webhooks import WebhookOptions, fan_out


def fanned_out(payload: bytes, content_type: str = "application/json", **fields: Any) -> Result:
    return run(fan_out, make_event(payload=payload, content_type=content_type, **fields), options=WebhookOptions())


def body_of(payload: bytes, content_type: str = "application/json", **fields: Any) -> str:
    result = fanned_out(payload, content_type, **fields)
    assert result is not None
    body = result["body"]
    assert isinstance(body, str)
    return body


def test_the_result_is_what_the_reply_function_takes() -> None:
    event = make_event(topic="shop.order.placed", key="k1", payload=b'{"a": 1}')
    assert run(fan_out, event, options=WebhookOptions()) == {
        "topic": "shop.order.placed",
        "key": "k1",
        "time": "2026-02-03T04:05:06.000789+00:00",
        "body": '{"type":"shop.order.placed","timestamp":"2026-02-03T04:05:06.000789Z","data":{"a": 1}}',
    }


@pytest.mark.parametrize(
    "payload",
    [
        "123456789012345678901234567890.123456789012345678901234567890",
        '{ "b" : 1.0e+500,\n\t"a":[ ],"a":2 }',
        "1" * 5000,
        '"\\u0000 \\ud800 \\/ ü \u2028"',
        "null",
    ],
    ids=["30 digits", "spaces and twice a name", "5000 digits", "escapes", "null"],
)
def test_json_stands_in_the_body_as_it_was_written(payload: str) -> None:
    assert body_of(payload.encode()).endswith(f',"data":{payload}}}')


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_any_json_makes_a_body_that_is_json(value: Any) -> None:
    assert json.loads(body_of(json.dumps(value).encode()))["data"] == value


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_arrives_as_a_string(text: str) -> None:
    assert json.loads(body_of(text.encode(), "text/plain"))["data"] == text


@pytest.mark.parametrize("topic", ['a"b', "a\\b", "ü.\n", "a\x01"])
def test_a_topic_cannot_break_the_body(topic: str) -> None:
    assert json.loads(body_of(b"1", topic=topic))["type"] == topic


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.a+json"]
)
def test_json_is_known_by_its_type(content_type: str) -> None:
    assert body_of(b'{"a":1}', content_type).endswith('"data":{"a":1}}')


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b'{"a":1},"type":"forged"',
        b"NaN",
        b"[Infinity]",
        b"{'a':1}",
        b"[1,]",
        b'"\n"',
        b"01",
        b"\xef\xbb\xbf1",
    ],
)
def test_broken_json_is_rejected_and_cannot_forge_the_body(payload: bytes) -> None:
    with pytest.raises(Reject, match="is not JSON"):
        fanned_out(payload)


def test_json_that_is_too_deep_to_be_looked_at_is_rejected() -> None:
    with pytest.raises(Reject, match="is not JSON"):
        fanned_out(b"[" * 100_000 + b"]" * 100_000)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream"])
def test_bytes_that_are_no_text_are_rejected(content_type: str) -> None:
    with pytest.raises(Reject, match=r"neither JSON nor text"):
        fanned_out(b"\xff\x00", content_type)


def test_a_time_of_another_zone_is_written_in_utc() -> None:
    event_time = datetime.fromisoformat("2026-02-03T04:05:06+05:30")
    assert '"timestamp":"2026-02-02T22:35:06Z"' in body_of(b"1", time=event_time)
    assert '"timestamp":"2026-02-02T22:35:06Z"' in body_of(b"1", time=event_time.astimezone(UTC))


def test_the_proxy_may_be_in_a_file_and_is_not_shown(tmp_path: Any) -> None:
    (tmp_path / "proxy").write_text("http://me:hush@proxy:3128\n")
    options = WebhookOptions.model_validate({"proxy_file": str(tmp_path / "proxy")})
    assert options.proxy is not None
    assert options.proxy.get_secret_value() == "http://me:hush@proxy:3128"
    assert "hush" not in repr(options)


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": "2m"}, {"allow": ["10.0.0.1/8"]}, {"proxy_resolves": True}, {"schedule": ["0s"]}, {"concurrency": 0}],
)
def test_options_that_could_not_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        WebhookOptions.model_validate(wrong)
