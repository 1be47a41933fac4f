"""Spans on their way to a collector that works, is slow, says no, or is not there: what is done for events goes on."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.trace import SpanKind
from structlog.testing import capture_logs

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Outcome, Refused, Unknown
from bridge.brokers.traced import TracedSink
from bridge.errors import SettingsError
from bridge.event import Event, Trace, trace_fields
from bridge.process import spans as module
from bridge.process.spans import FLUSH_LIMIT, Spans
from bridge.process.traces import recording, refusal
from bridge.settings import ObserveSettings, Settings, SinkSettings
from tests.support.collector import SAMPLED, TRACE, Collector, collecting
from tests.support.events import make_event


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting(monkeypatch) as collector:
        yield collector


@pytest.fixture
def spans(collector: Collector) -> Iterator[Spans]:
    made = Spans("shop", "test")
    yield made
    made.close()


def leave(spans: Spans, count: int = 1) -> None:
    event = make_event(headers={"traceparent": SAMPLED})
    for _ in range(count):
        spans.begin(event, "a span", SpanKind.INTERNAL, {}).end()


def actions(lines: list[Any]) -> list[str]:
    return [line["event"] for line in lines]


def test_what_was_recorded_last_is_sent_before_the_process_ends(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    with capture_logs() as lines, recording(Settings(name="shop", observe=ObserveSettings(traces=True)), "test") as it:
        assert it is not None
        leave(it, 1000)
    assert len(collector.spans) == 1000
    assert lines == []


def test_the_environment_names_the_service_and_its_resource(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")
    spans = Spans("shop", "ours")
    leave(spans)
    spans.close()
    (span,) = collector.spans
    assert span.service == "theirs"
    assert span.resource["deployment.environment.name"] == "staging"
    assert span.resource["service.namespace"] == "shop"


def test_a_sampler_of_the_environment_may_take_fewer(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    spans = Spans("shop", "test")
    leave(spans, 10)
    spans.close()
    assert collector.spans == []


def test_a_collector_that_hangs_holds_up_nothing_and_what_waits_is_limited(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "600")
    collector.mode = "hangs"
    with capture_logs() as lines:
        spans = Spans("shop", "test")
        leave(spans)
        collector.wait_for_requests(1)
        began = time.monotonic()
        leave(spans, 5000)
        assert time.monotonic() - began < 5
        began = time.monotonic()
        spans.close()
        assert time.monotonic() - began < FLUSH_LIMIT + 1
    assert actions(lines) == ["spans.lost", "spans.left"]
    assert "OTEL_BSP_MAX_QUEUE_SIZE" in lines[0]["reason"]
    assert lines[1]["lost"] == 5001


def test_a_login_in_the_collectors_url_is_not_said(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    collector.mode = "refuses"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.replace("//", "//user:s3cr%40t@"))
    with capture_logs() as lines:
        spans = Spans("shop", "test")
        leave(spans)
        spans.close()
    assert actions(lines) == ["spans.lost", "spans.left"]
    assert "s3cr" not in str(lines)


def test_a_collector_is_asked_whether_it_takes_spans(collector: Collector) -> None:
    assert refusal() is None
    assert collector.spans == []
    collector.mode = "refuses"
    place = collector.url.removeprefix("http://")
    assert refusal() == (
        f"the collector at {place} takes no spans: Failed to export spans batch code: 403, reason: Forbidden"
    )
    collector.close()
    assert refusal() == f"the collector at {place} takes no spans: Connection refused"


@pytest.mark.parametrize("how", ["refuses", "gone"])
def test_a_collector_that_takes_nothing_is_said_once_and_so_is_its_return(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(module, "_CALM", 0.0)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    spans = Spans("shop", "test")
    if how == "gone":
        collector.close()
    else:
        collector.mode = "refuses"
    with capture_logs() as lines:
        leave(spans)
        until(lambda: bool(lines), "the loss is said")
        leave(spans)
        until(lambda: spans._losses._count == 2, "the second one is counted")
        if how == "gone":
            collector.open()
        collector.mode = "takes"
        sent = 0
        while len(lines) < 2:  # on a busy machine an answer may take longer than the 0.2 s, and be a loss
            leave(spans)
            sent += 1
            collector.wait_for(lambda arrived, sent=sent: len(arrived) >= sent)  # type: ignore[misc]
        spans.close()
    assert actions(lines) == ["spans.lost", "spans.restored"]
    assert collector.url.removeprefix("http://") in lines[0]["reason"]
    assert ("Forbidden" if how == "refuses" else "Failed to export") in lines[0]["reason"]
    assert 2 <= lines[1]["lost"] < 2 + sent


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf only"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "user:s3cret@collector:4318", "OTEL_EXPORTER_OTLP_ENDPOINT is no URL"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "OTEL_BSP_MAX_QUEUE_SIZE is 'many'"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "5000", "max_export_batch_size"),
    ],
)
def test_variables_that_cannot_be_followed_end_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=r"^observe\.traces: ") as raised:
        Spans("shop", "test")
    assert says in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_without_the_package_the_error_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.exporter'] = None\n"
        "from bridge.process.traces import make_spans\n"
        "from bridge.settings import Settings\n"
        "make_spans(Settings(name='shop'), 'test')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "SettingsError: observe.traces: needs the package opentelemetry.exporter" in done.stderr
    assert "pip install 'pgbridge[otel]'" in done.stderr


def test_nothing_of_opentelemetry_is_imported_where_nothing_is_traced() -> None:
    code = (
        "import sys\n"
        "import bridge.daemon, bridge.brokers.rabbitmq.sink, bridge.brokers.nats.sink, workers.commands\n"
        "from bridge.process.traces import recording\n"
        "from bridge.settings import Settings\n"
        "with recording(Settings(name='shop'), 'test') as spans: assert spans is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


class Scripted:
    """A sink that keeps what it is given, and answers in turn."""

    is_open = pipelines = True
    stalled = None

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = outcomes
        self.given: Any = None

    async def publish(self, events: Any) -> Any:
        self.given = events
        return self.outcomes[: len(events)]

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def topology(self, *, apply: bool) -> Any: ...


async def test_events_of_no_sampled_trace_pass_untouched(collector: Collector, spans: Spans) -> None:
    sink = Scripted(CONFIRMED, CONFIRMED, CONFIRMED)
    events = [make_event(), *(make_event(headers={"traceparent": text}) for text in (f"{SAMPLED[:-1]}0", "nonsense"))]
    await TracedSink(sink, SinkSettings(type="memory"), spans).publish(events)
    assert sink.given is events


async def test_each_try_is_a_span_that_says_what_became_of_it(collector: Collector, spans: Spans) -> None:
    outcomes: list[Outcome] = [
        CONFIRMED,
        Never("too_large", "the message has 9 bytes"),
        NotSent("gone"),
        Refused("full"),
        Unknown("lost"),
    ]
    sink = Scripted(*outcomes)
    events = [make_event(headers={"traceparent": SAMPLED, "mine": "1"}) for _ in outcomes]
    assert list(await TracedSink(sink, SinkSettings(type="memory"), spans).publish(events)) == outcomes
    collector.wait_for(lambda arrived: len(arrived) == len(outcomes))
    by_id = {span.attributes["messaging.message.id"]: span for span in collector.spans}
    found = [by_id[event.id] for event in events]
    assert [(span.attributes.get("error.type"), span.failed) for span in found] == [
        (None, None),
        ("too_large", "the message has 9 bytes"),
        ("not_sent", "gone"),
        ("refused", "full"),
        ("unknown", "lost"),
    ]
    for event, given, span in zip(events, sink.given, found, strict=True):
        assert span.parent_id == "b7ad6b7169203331"
        assert given == event._replace(headers={"traceparent": f"00-{TRACE}-{span.span_id}-01", "mine": "1"})


@pytest.mark.parametrize(
    ("text", "named", "sampled"),
    [
        (SAMPLED, True, True),
        (f"{SAMPLED[:-2]}00", True, False),
        (f"{SAMPLED[:-2]}02", True, False),
        (f"cc{SAMPLED[2:]}-more", True, True),
        (f"{SAMPLED}-more", False, False),
        (f"ff{SAMPLED[2:]}", False, False),
        (SAMPLED.upper(), False, False),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", False, False),
        (f"00-{TRACE}-{'0' * 16}-01", False, False),
        (f"{SAMPLED}\n", False, False),
        ("\x1b[31m", False, False),
        ("", False, False),
    ],
)
def test_only_a_traceparent_of_w3c_names_a_trace(text: str, named: bool, sampled: bool) -> None:
    event: Event = make_event(headers={"traceparent": text})
    assert event.trace == (Trace(TRACE, "b7ad6b7169203331") if named else None)
    assert event.is_sampled == sampled
    assert dict(trace_fields(event)) == ({"trace_id": TRACE, "span_id": "b7ad6b7169203331"} if named else {})


def test_an_event_without_headers_belongs_to_no_trace() -> None:
    assert make_event().trace is None
    assert not make_event().is_sampled
