"""One trace from an application's transaction over bridge, worker and reply to what the reply's own event leads to.

docs/tracing.md shows the tree. `UPDATE_PAGES=1 pytest tests/integration/test_traces.py` writes it anew.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from bridge.settings import PostgresSettings
from tests.support.collector import SAMPLED, TRACE, Collector, Span, collecting
from tests.support.daemons import Daemon, run_command
from tests.support.environment import ROOT
from tests.support.events import make_event
from tests.support.messages import execute
from tests.support.servers import NatsServer
from tests.support.until import rows_become

SETTINGS: Final = """\
name = "shop"
[postgres]
dsn = {bridge}
{sink}
[[routes]]
topic = "#"
sink = "e"
[workers]
dsn = {worker}
[workers.{invoices}]
handler = "tests.support.worker_handlers:typeset"
reply = "shop.rendered"
[workers.{mail}]
handler = "tests.support.worker_handlers:mail"
[observe]
traces = {traces}
"""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting(monkeypatch, delay=100) as collector:
        yield collector


class Shop:
    """A database, a broker, a bridge and two workers, with the settings of a test."""

    def __init__(self, folder: Path, bridge: str, worker: str, sink: str, unique: str, *, traces: bool = True) -> None:
        self.dsn = bridge
        self.invoices, self.mail = f"invoices-{unique}", f"mail-{unique}"
        text = SETTINGS.format(
            bridge=json.dumps(bridge),
            worker=json.dumps(worker),
            sink=sink,
            invoices=self.invoices,
            mail=self.mail,
            traces=json.dumps(traces),
        )
        self.bridge = Daemon(folder, text)
        self.workers = {
            name: Daemon(folder / name, text, "run", name, module="workers.cli") for name in (self.invoices, self.mail)
        }
        applied = run_command("topology", "--apply", "--config", str(self.bridge.config))
        assert applied.returncode == 0, applied.stderr

    def start(self) -> None:
        self.bridge.start()
        for worker in self.workers.values():
            worker.start()
        self.bridge.wait_for("bridge.leading")
        for worker in self.workers.values():
            worker.wait_for("worker.started")

    def order(self, traceparent: str | None) -> None:
        """An application's transaction."""
        with psycopg.connect(self.dsn) as connection:
            if traceparent is not None:
                connection.execute("select set_config('bridge.traceparent', %s, true)", (traceparent,))
            connection.execute("""select bridge.emit('shop.invoice.requested', '{"order": 7}'::jsonb)""")

    async def is_done(self, orders: int) -> None:
        """Until so many orders have come through both workers."""
        await rows_become(
            self.dsn, "select count(*)::int from bridge.inbox where finished_at is not null", [(2 * orders,)]
        )

    def stop(self) -> None:
        for process in (*self.workers.values(), self.bridge):
            assert process.stop() == 0

    def close(self) -> None:
        for process in (*self.workers.values(), self.bridge):
            process.__exit__(None, None, None)


@pytest.fixture
def shop_on(
    place: tuple[str, str], tmp_path: Path, bridge_database: str, shop: PostgresSettings, unique: str
) -> Iterator[Shop]:
    """On each broker."""
    made = Shop(tmp_path, bridge_database, shop.dsn.get_secret_value(), place[0], unique)
    yield made
    made.close()


def begin_trace(collector: Collector, order: "Shop") -> str:
    """An application, whose request has a span: the id of its trace."""
    provider = TracerProvider(resource=Resource.create({"service.name": "shop"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{collector.url}/v1/traces")))
    with provider.get_tracer("shop").start_as_current_span("POST /orders", kind=SpanKind.SERVER) as span:
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers)
        order.order(headers["traceparent"])
    provider.shutdown()
    return f"{span.get_span_context().trace_id:032x}"


async def test_one_trace_leads_from_the_transaction_over_bridge_worker_and_reply_to_the_next_worker(
    shop_on: Shop, collector: Collector, unique: str
) -> None:
    shop_on.start()
    trace_id = begin_trace(collector, shop_on)
    await shop_on.is_done(1)
    shop_on.stop()
    assert {span.trace_id for span in collector.spans} == {trace_id}

    def short(name: str) -> str:
        return name.replace(f"-{unique}", "").replace(unique, "events")

    by_name = {short(span.name): span for span in collector.spans}
    tree = collector.tree(trace_id, short)
    assert shape(tree) == [
        (0, "POST /orders"),
        (1, "send events"),
        (2, "process invoices"),
        (3, "typeset"),
        (3, "reply shop.rendered"),
        (4, "send events"),
        (5, "process mail"),
    ]
    assert {short(span.service) for span in collector.spans} == {
        "shop",
        "pgbridge",
        "pgbridge-worker-invoices",
        "pgbridge-worker-mail",
    }
    follows_the_conventions(by_name["send events"], by_name["process invoices"])
    said(shop_on, trace_id, collector)
    if shop_on.bridge.config.read_text().count('type = "nats"'):
        shows(tree)


async def test_without_traces_nothing_is_sent_and_the_log_names_the_trace_of_the_transaction(
    nats_server: NatsServer,
    tmp_path: Path,
    bridge_database: str,
    shop: PostgresSettings,
    unique: str,
    collector: Collector,
) -> None:
    sink = f'[sinks.e]\ntype = "nats"\nurl = "{nats_server.url}"\nstream = "{unique}"'
    quiet = Shop(tmp_path, bridge_database, shop.dsn.get_secret_value(), sink, unique, traces=False)
    try:
        quiet.start()
        quiet.order(SAMPLED)
        await quiet.is_done(1)
        quiet.stop()
    finally:
        quiet.close()
    assert collector.requests == 0
    lines = quiet.workers[quiet.invoices].lines()
    ours = [line for line in lines if line["action"] in ("event.handled", "shop.typeset")]
    assert len(ours) == 2
    assert {(line["trace_id"], line["span_id"]) for line in ours} == {(TRACE, "b7ad6b7169203331")}


async def test_a_collector_that_hangs_holds_up_neither_events_nor_a_stop(
    nats_server: NatsServer,
    tmp_path: Path,
    bridge_database: str,
    shop: PostgresSettings,
    unique: str,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "512")
    sink = f'[sinks.e]\ntype = "nats"\nurl = "{nats_server.url}"\nstream = "{unique}"'
    traced = Shop(tmp_path, bridge_database, shop.dsn.get_secret_value(), sink, unique)
    collector.mode = "hangs"
    try:
        traced.bridge.start()
        traced.bridge.wait_for("bridge.leading")
        await execute(
            bridge_database,
            "select bridge.emit('shop.other', 'x', headers => jsonb_build_object('traceparent', %s::text))"
            " from generate_series(1, 5000)",
            SAMPLED,
        )
        await rows_become(bridge_database, "select sum(backlog)::int from bridge.status()", [(0,)])
        began = time.monotonic()
        assert traced.bridge.stop() == 0
        assert time.monotonic() - began < 10
    finally:
        traced.close()
    said = [line["action"] for line in traced.bridge.lines() if line["action"].startswith("spans.")]
    assert said == ["spans.lost", "spans.left"]
    assert traced.bridge.wait_for("spans.left")["lost"] == 5000


def shape(tree: str) -> list[tuple[int, str]]:
    """The depth and the name of each span of a tree."""
    rows = []
    for line in tree.splitlines():
        branch, name = re.fullmatch(r"([│├└─ ]*)(.*?)  .*", line).groups()  # type: ignore[union-attr]
        rows.append((len(branch) // 3, name))
    return rows


def follows_the_conventions(sent: Span, processed: Span) -> None:
    assert (sent.kind, processed.kind) == (4, 5)
    for span, operation in ((sent, "send"), (processed, "process")):
        assert span.attributes["messaging.operation.name"] == span.attributes["messaging.operation.type"] == operation
        assert span.attributes["messaging.system"] in ("rabbitmq", "nats", "gcp_pubsub")
        assert span.attributes["messaging.destination.name"]
        assert span.attributes["messaging.message.id"] == span.attributes["cloudevents.event_id"]
        assert span.failed is None
        assert span.resource["service.namespace"] == "shop"
    assert processed.attributes["pgbridge.attempt"] == 1
    assert processed.attributes["pgbridge.outcome"] == "handled"


def said(shop: Shop, trace_id: str, collector: Collector) -> None:
    """The workers' lines about the event name its trace and their span; what a handler logs, too."""
    spans = {span.span_id for span in collector.spans if span.name.startswith("process")}
    lines = [line for worker in shop.workers.values() for line in worker.lines()]
    ours = [line for line in lines if line["action"] in ("event.handled", "shop.typeset", "library.message")]
    assert sorted(line["action"] for line in ours) == [*["event.handled"] * 2, "library.message", "shop.typeset"]
    assert {line["trace_id"] for line in ours} == {trace_id}
    assert {line["span_id"] for line in ours} == spans
    assert not any("trace_id" in line for line in lines if line["action"].startswith("worker."))


PAGE: Final = ROOT / "docs" / "tracing.md"
TREE: Final = re.compile(r"(?<=```text\n)POST /orders.*?(?=```\n)", re.DOTALL)


def shows(tree: str) -> None:
    """The page shows this tree."""
    if os.environ.get("UPDATE_PAGES"):
        PAGE.write_text(TREE.sub(lambda _: tree, PAGE.read_text()))
    found = TREE.search(PAGE.read_text())
    assert found is not None
    assert shape(found[0]) == shape(tree)


async def test_a_transaction_begins_a_trace_as_the_page_says(bridge_database: str) -> None:
    shown = r"select set_config\('bridge.traceparent', format.*?(?=\n +where random)"
    statement = re.search(shown, PAGE.read_text(), re.DOTALL)
    assert statement is not None
    with psycopg.connect(bridge_database) as connection:
        connection.execute(statement[0].encode())
        connection.execute("select bridge.emit('shop.test', '{}'::jsonb)")
        [(text,)] = connection.execute("select headers ->> 'traceparent' from bridge.outbox").fetchall()
    assert make_event(headers={"traceparent": text}).is_sampled
