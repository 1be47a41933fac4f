"""Spans of attempts: one each, below the step that brought the message, and current while the handler runs; so what its
libraries record, and it itself, is in the trace. The reply has a span below it, in whose trace it emits."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span, SpanKind, StatusCode, format_span_id, use_span
from structlog.contextvars import bind_contextvars

from bridge.brokers.traced import messaging, operation
from bridge.event import TRACEPARENT, Event
from bridge.process.spans import Spans, carried
from bridge.settings import SinkSettings
from workers.settle import Settle


class AttemptSpans:
    """Makes them for one worker. `settings` are those of the sink on whose broker its queue is."""

    def __init__(self, worker: str, settings: SinkSettings, spans: Spans) -> None:
        self._worker = worker
        self._settings = settings
        self._spans = spans

    @contextmanager
    def attempt(self, event: Event, number: int) -> Iterator["AttemptSpan"]:
        """The span of one attempt, the `number`th, which lasts as long as the body. Log lines name it from now on."""
        attributes: dict[str, str | int] = {
            **operation("process"),
            **messaging(self._settings, event),
            "messaging.destination.subscription.name": self._worker,
            "pgbridge.attempt": number,
        }
        span = self._spans.begin(event, f"process {self._worker}", SpanKind.CONSUMER, attributes)
        bind_contextvars(span_id=format_span_id(span.get_span_context().span_id))
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                yield AttemptSpan(span, self._spans)
        except asyncio.CancelledError:
            span.set_attribute("pgbridge.outcome", "given_back")
            raise
        except Exception as error:
            _fail(span, type(error).__name__, str(error))
            raise
        finally:
            span.end()


class AttemptSpan:
    """One of them."""

    def __init__(self, span: Span, spans: Spans) -> None:
        self._span = span
        self._spans = spans

    def became(self, settle: Settle) -> None:
        """What the attempt led to, in the words of the log."""
        self._span.set_attribute("pgbridge.outcome", settle.outcome)
        if settle.failure is not None:
            _fail(self._span, settle.failure.code, settle.failure.reason)
            if settle.outcome == "retried":
                self._span.set_attribute("pgbridge.retry_after_seconds", round(settle.delay, 3))

    @contextmanager
    def reply(self, function: str) -> Iterator[str | None]:
        """The span of the reply, which lasts as long as the body; gives what carries it into PostgreSQL."""
        attributes: dict[str, str | int] = {
            "db.system.name": "postgresql",
            "db.operation.name": "SELECT",
            "db.stored_procedure.name": function,
        }
        span = self._spans.begin_below(self._span, f"reply {function}", SpanKind.CLIENT, attributes)
        try:
            yield carried(span).get(TRACEPARENT)
        except Exception as error:
            _fail(span, type(error).__name__, str(error))
            raise
        finally:
            span.end()


def _fail(span: Span, code: str, reason: str) -> None:
    span.set_attribute("error.type", code)
    span.set_status(StatusCode.ERROR, reason)
