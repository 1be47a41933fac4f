"""A sink whose events leave a span each: from the call until the broker's answer, below the step that came before.

Each try of an event is a span of its own. Batches have none: whoever looks at a trace wants to see where one event was,
and few tools draw what is only linked to it. What nobody samples costs a look at its headers.
"""

from collections.abc import Mapping, Sequence

from opentelemetry.trace import Span, SpanKind, StatusCode

from bridge.brokers.contract import Confirmed, Declaration, Never, NotSent, Outcome, Refused, Sink, Unknown
from bridge.event import Event
from bridge.process.spans import Spans, carried
from bridge.settings import SinkSettings


class TracedSink:
    """Another sink, with spans. See `bridge.brokers.contract.Sink`."""

    def __init__(self, sink: Sink, settings: SinkSettings, spans: Spans) -> None:
        self._sink = sink
        self._settings = settings
        self._spans = spans
        self._name = f"send {settings.destination}"

    @property
    def is_open(self) -> bool:
        """See `contract.Sink.is_open`."""
        return self._sink.is_open

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        return self._sink.stalled

    @property
    def pipelines(self) -> bool:
        """See `contract.Sink.pipelines`."""
        return self._sink.pipelines

    async def open(self) -> None:
        """See `contract.Sink.open`."""
        await self._sink.open()

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """See `contract.Sink.publish`. An event of a sampled trace travels with its span as `traceparent`."""
        spans: dict[int, Span] = {}
        for place, event in enumerate(events):
            if event.is_sampled:
                spans[place] = self._begin(event)
        if not spans:
            return await self._sink.publish(events)
        sent = list(events)
        for place, span in spans.items():
            event = sent[place]
            sent[place] = event._replace(headers={**event.headers, **carried(span)})
        outcomes: Sequence[Outcome] = ()
        try:
            outcomes = await self._sink.publish(sent)
        finally:
            for place, span in spans.items():
                _end(span, outcomes[place] if outcomes else None)
        return outcomes

    def _begin(self, event: Event) -> Span:
        attributes = {**operation("send"), **messaging(self._settings, event)}
        return self._spans.begin(event, self._name, SpanKind.PRODUCER, attributes)

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """See `contract.Sink.topology`."""
        return await self._sink.topology(apply=apply)

    async def close(self) -> None:
        """See `contract.Sink.close`."""
        await self._sink.close()


def operation(name: str) -> Mapping[str, str]:
    """What is done with a message, by OpenTelemetry's conventions: ``send`` or ``process``."""
    return {"messaging.operation.name": name, "messaging.operation.type": name}


def messaging(settings: SinkSettings, event: Event) -> Mapping[str, str]:
    """What OpenTelemetry's conventions say of an event on this broker. Its key and payload stay out: spans are read by
    more people than events."""
    return {
        "messaging.system": settings.messaging_system,
        "messaging.destination.name": settings.destination_of(event.topic),
        "messaging.message.id": event.id,
        "cloudevents.event_id": event.id,
        "cloudevents.event_type": event.topic,
        "cloudevents.event_source": event.source,
    }


def _end(span: Span, outcome: Outcome | None) -> None:
    if outcome is None:
        span.set_status(StatusCode.ERROR, "the bridge stopped before the broker had answered")
    elif not isinstance(outcome, Confirmed):
        span.set_attribute("error.type", _code(outcome))
        span.set_status(StatusCode.ERROR, outcome.reason)
    span.end()


def _code(outcome: Never | NotSent | Refused | Unknown) -> str:
    match outcome:
        case Never():
            return outcome.code
        case NotSent():
            return "not_sent"
        case Refused():
            return "refused"
        case Unknown():
            return "unknown"
