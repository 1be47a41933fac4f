"""An OpenTelemetry collector for tests: it takes spans over OTLP/HTTP, and can be slow, unwilling or gone."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Event, Thread
from types import TracebackType
from typing import Any, Final, Literal, Self

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE: Final = "0af7651916cd43dd8448eb211c80319c"
SAMPLED: Final = f"00-{TRACE}-b7ad6b7169203331-01"
"""A `traceparent` of that trace, which its beginner samples."""

_BRANCH: Final = ("├─ ", "└─ ")
_TRUNK: Final = ("│  ", "   ")


@dataclass(frozen=True)
class Span:
    """As it arrived."""

    name: str
    kind: int
    """OTLP's: 2 server, 3 client, 4 producer, 5 consumer."""
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    began: int
    ended: int
    failed: str | None
    """What its status says, where that is an error."""
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Collector:
    """Listens at `url` while it is entered; `close` and `open` in between take it away and bring it back."""

    mode: Literal["takes", "refuses", "hangs"] = "takes"
    spans: list[Span] = field(default_factory=list)
    requests: int = 0

    def __post_init__(self) -> None:
        self._changed = Condition()
        self._let_go = Event()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        self._let_go.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._server.daemon_threads = True
        self._port = self._server.server_port
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """What hangs is let go too."""
        self._let_go.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_for(self, what: Callable[[list[Span]], object], limit: float = 30.0) -> None:
        """Until it holds of the spans that have arrived."""
        with self._changed:
            assert self._changed.wait_for(lambda: what(self.spans), limit), [span.name for span in self.spans]

    def wait_for_requests(self, count: int, limit: float = 30.0) -> None:
        """Until so many requests were begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.requests >= count, limit), self.requests

    def tree(self, trace_id: str, rename: Callable[[str], str] = str) -> str:
        """The spans of one trace, each below its parent, with milliseconds from the beginning and of its length.
        `rename` gives spans and services the names that are shown."""
        ours = sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.began)
        ids = {span.span_id for span in ours}
        roots = [span for span in ours if span.parent_id not in ids]
        first = min(span.began for span in ours)
        rows = [row for root in roots for row in _rows(root, ours, "", "")]
        shown = [(rename(text), rename(span.service), span) for text, span in rows]
        name, service = (max(map(len, column)) for column in list(zip(*shown, strict=True))[:2])
        return "".join(
            f"{text:<{name}}  {where:<{service}}  {(span.began - first) / 1e6:6.1f} ms  "
            f"{(span.ended - span.began) / 1e6:6.1f} ms\n"
            for text, where, span in shown
        )

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                with collector._changed:
                    collector.requests += 1
                    if collector.mode == "takes":
                        collector.spans += _read(body)
                    collector._changed.notify_all()
                if collector.mode == "hangs":
                    collector._let_go.wait()
                    return
                self.send_response(200 if collector.mode == "takes" else 403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        return Handler


def _read(body: bytes) -> Iterator[Span]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        ours = _plain(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.name,
                    span.kind,
                    ours["service.name"],
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.message if span.status.code == 2 else None,
                    _plain(span.attributes),
                    ours,
                )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _rows(span: Span, among: list[Span], head: str, below: str) -> Iterator[tuple[str, Span]]:
    yield head + span.name, span
    children = [child for child in among if child.parent_id == span.span_id]
    for number, child in enumerate(children, 1):
        last = number == len(children)
        yield from _rows(child, among, below + _BRANCH[last], below + _TRUNK[last])


@contextmanager
def collecting(monkeypatch: pytest.MonkeyPatch, delay: int = 20) -> Iterator[Collector]:
    """A collector to which the environment sends spans, some `delay` milliseconds after they ended."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", str(delay))
        yield collector
