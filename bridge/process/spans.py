"""Spans of events, made and sent by OpenTelemetry's SDK, which its own environment variables set up.

A trace begins where an application puts `traceparent` around its transaction; nothing here begins one, and an event
whose trace is not sampled has no span. What is done for an event never waits for a collector: ended spans wait in a
queue of limited length for a thread of the SDK's. What the queue or the collector does not take is lost, and said.
"""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from threading import Lock, Thread
from typing import Final
from urllib.parse import urlsplit
from uuid import uuid4

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from bridge import __version__
from bridge.errors import SettingsError
from bridge.event import Event

log = structlog.get_logger()

FLUSH_LIMIT: Final = 2.0
"""Seconds that a process which stops gives to the last spans."""

_ANSWER_LIMIT: Final = 2.0
"""Seconds in which a collector must answer that is only asked whether it would take spans."""

_CALM: Final = 60.0
"""Seconds without a loss after which losses are over."""

_QUEUE: Final = 2048
"""Spans that wait at most, as the SDK has it, where OTEL_BSP_MAX_QUEUE_SIZE says nothing."""

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_W3C: Final = TraceContextTextMapPropagator()


class Spans:
    """Makes the spans of one process. To be closed."""

    def __init__(self, name: str, service: str) -> None:
        """`name` is the bridge's, the namespace of its processes; `service` that of this process, where the environment
        gives no other. Also what a handler's libraries record goes this way.

        Raises SettingsError for variables of OpenTelemetry that cannot be followed.
        """
        _require_what_we_speak()
        ours = {
            "service.namespace": name,
            "service.name": service,
            "service.version": __version__,
            "service.instance.id": str(uuid4()),
        }
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        self._losses = Losses()
        try:
            self._exporter = _Exporter(OTLPSpanExporter(), self._losses)
            self._processor = _Processor(self._exporter, _queue_size(), self._losses)
        except (ValueError, OSError) as error:
            raise _not_set_up(error) from error
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        trace.set_tracer_provider(self._provider)
        self._tracer = self._provider.get_tracer("pgbridge", __version__)

    def begin(self, event: Event, name: str, kind: SpanKind, attributes: Mapping[str, str | int]) -> Span:
        """A span below the last step in the event's trace; to be ended."""
        return self._tracer.start_span(name, _W3C.extract(event.headers, Context()), kind, attributes)

    def begin_below(self, parent: Span, name: str, kind: SpanKind, attributes: Mapping[str, str | int]) -> Span:
        """A span below another one of this process; to be ended."""
        return self._tracer.start_span(name, trace.set_span_in_context(parent, Context()), kind, attributes)

    def close(self) -> None:
        """Sends what waits, for FLUSH_LIMIT seconds at most, and says what did not arrive."""
        # The SDK itself would wait for half a minute.
        closing = Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(FLUSH_LIMIT)
        if closing.is_alive():
            self._exporter.shutdown()
        self._losses.sum_up(self._processor.waiting + self._exporter.sending)


def carried(span: Span) -> Mapping[str, str]:
    """The headers with which the span's trace goes on elsewhere: `traceparent`, and `tracestate` where it has one."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, trace.set_span_in_context(span, Context()))
    return headers


def ask_collector() -> str | None:
    """Sends no spans, to learn whether the collector takes any: why it does not, or None. Raises as `Spans`."""
    _require_what_we_speak()
    try:
        exporter = OTLPSpanExporter(timeout=_ANSWER_LIMIT)
    except (ValueError, OSError) as error:
        raise _not_set_up(error) from error
    problem = _export(exporter, ())
    exporter.shutdown()  # type: ignore[no-untyped-call]
    return problem


class Losses:
    """Spans that did not arrive: said when that begins and when it is over, however many they are. For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._since: float | None = None
        self._last = 0.0
        self._count = 0

    def lose(self, count: int, reason: str) -> None:
        """So many are lost."""
        now = time.monotonic()
        with self._lock:
            begins = self._since is None
            if self._since is None:
                self._since = now
            self._last = now
            self._count += count
        if begins:
            hint = "events go on without them; how many they were is said once they arrive again"
            log.warning("spans.lost", reason=reason, hint=hint)

    def arrived(self) -> None:
        """Some have arrived."""
        now = time.monotonic()
        with self._lock:
            if self._since is None or now - self._last < _CALM:
                return
            count, seconds = self._count, self._last - self._since
            self._since, self._count = None, 0
        log.info("spans.restored", lost=count, seconds=round(seconds, 3))

    def sum_up(self, unsent: int) -> None:
        """The process ends, and `unsent` more were still on their way."""
        with self._lock:
            count = self._count + unsent
        if count:
            log.warning("spans.left", lost=count)


class _Processor(BatchSpanProcessor):
    """Keeps the queue within its length by itself: the SDK drops in silence, as far as a program can tell."""

    def __init__(self, exporter: "_Exporter", size: int, losses: Losses) -> None:
        self._exporter = exporter
        self._size = size
        self._losses = losses
        self._lock = Lock()
        self._accepted = 0
        super().__init__(exporter, max_queue_size=size)

    @property
    def waiting(self) -> int:
        """Spans in the queue."""
        return self._accepted - self._exporter.taken

    def on_end(self, span: ReadableSpan) -> None:
        if not (span.context and span.context.trace_flags.sampled):
            return
        with self._lock:
            has_room = self.waiting < self._size
            self._accepted += has_room
        if has_room:
            super().on_end(span)
        else:
            self._losses.lose(1, f"{self._size} spans wait for the collector, and no more may: OTEL_BSP_MAX_QUEUE_SIZE")


class _Exporter(SpanExporter):
    """Exports, and turns what the library would say at every try into losses."""

    def __init__(self, exporter: OTLPSpanExporter, losses: Losses) -> None:
        self._exporter = exporter
        self._losses = losses
        self.taken = 0
        """Spans that came out of the queue."""
        self.sending = 0
        """Those of them that are on their way."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        self.sending = len(spans)
        problem = _export(self._exporter, spans)
        self.sending = 0
        if problem is None:
            self._losses.arrived()
            return SpanExportResult.SUCCESS
        self._losses.lose(len(spans), problem)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class _Words(logging.Filter):
    """Keeps what the exporter says for whoever asks, and out of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING and isinstance(record.args, tuple) and record.args:
            # It is about to try again: the first of its words is why.
            self.said.append(str(record.args[0]))
        else:
            self.said.append(record.getMessage())
        return False


_words: Final = _Words()

_OF_THE_SYSTEM: Final = re.compile(r"\[Errno -?\d+\] ([\w ]+)")


def _export(exporter: OTLPSpanExporter, spans: Sequence[ReadableSpan]) -> str | None:
    """Why the collector did not take these; None where it did."""
    logging.getLogger(OTLPSpanExporter.__module__).addFilter(_words)
    _words.said.clear()
    if exporter.export(spans) is SpanExportResult.SUCCESS:
        return None
    given = next(filter(None, (os.environ.get(name) for name in _ENDPOINTS)), "http://localhost:4318")
    # The URL may hold a login.
    place = urlsplit(given).netloc.rpartition("@")[2]
    said = _words.said[0] if _words.said else "it does not answer"
    # Errors of several libraries, one around the other: the innermost is the system's.
    system = _OF_THE_SYSTEM.search(said)
    return f"the collector at {place} takes no spans: {system[1] if system else said}"


def _not_set_up(error: Exception) -> SettingsError:
    return SettingsError(f"observe.traces: OpenTelemetry cannot be set up by OTEL_...: {error}")


def _require_what_we_speak() -> None:
    for name in _PROTOCOLS:
        protocol = os.environ.get(name, "").strip()
        if protocol not in ("", "http/protobuf"):
            raise SettingsError(
                f"observe.traces: {name} is {protocol!r}, and spans are sent by http/protobuf only; collectors take it "
                "at port 4318. Change the variable, or leave it out"
            )
    for name in _ENDPOINTS:
        # Its text is not shown: it may hold a password.
        if not os.environ.get(name, "http://").strip().lower().startswith(("http://", "https://")):
            raise SettingsError(f"observe.traces: {name} is no URL; write http://collector:4318 or https://...")


def _queue_size() -> int:
    text = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip() or str(_QUEUE)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"OTEL_BSP_MAX_QUEUE_SIZE is {text!r}, and no number of spans")
    return int(text)
