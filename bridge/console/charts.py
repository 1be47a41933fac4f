"""The charts of the pages Flow and Workers: the last hour, day or month of this bridge, its sinks and its workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bridge.console.chart import LINES, chart
from bridge.postgres.history import HOUR, SPANS, History, Series, Span, read_history
from bridge.postgres.wire import Connection


@dataclass(frozen=True, slots=True)
class Charts:
    """What the template ``_charts.html`` shows."""

    span: Span
    figures: Sequence[Markup] = ()
    problem: str | None = None
    """Why there are none."""


def span_of(name: str | None) -> Span:
    """The span of this name; the last hour for any other."""
    return SPANS.get(name or "", HOUR)


async def charts(connection: Connection, bridge: str, workers: Sequence[str], span: Span) -> Charts:
    """Of one bridge, all its sinks, and the workers of these names. Raises as `read_history`."""
    itself = await read_history(connection, "bridge", bridge, [""], span)
    sinks = await read_history(connection, "sink", bridge, None, span)
    working = await read_history(connection, "worker", "", list(workers), span) if workers else {}
    return Charts(span, list(_figures(itself[""], sinks, working)))


async def worker_charts(connection: Connection, names: Sequence[str], span: Span) -> Charts:
    """Of these workers alone: what a chart has room for, the first six. Raises as `read_history`."""
    working = await read_history(connection, "worker", "", names[:LINES], span)
    return Charts(span, _drawn(_of_workers(working)))


def _figures(itself: History, sinks: Mapping[str, History], workers: Mapping[str, History]) -> list[Markup]:
    named = {name: sink for name, sink in sinks.items() if name}
    published = [itself.rate("emitted", "emitted")]
    published += [sink.rate(f"published to {name}", "published") for name, sink in named.items()]
    found = [chart("chart-published", "Events a second", published)]
    behind: list[tuple[str, str, list[Series]]] = [
        ("lag", "Oldest unsent event", [sink.level(name, "seconds", "lag") for name, sink in named.items()]),
        ("backlog", "Backlog", [sink.level(name, "events", "backlog") for name, sink in named.items()]),
        (
            "held",
            "Held, and dead letters",
            [sink.level(f"held, {name}", "events", "held") for name, sink in named.items()],
        ),
    ]
    behind[-1][2].append(itself.level("dead letters", "events", "dead_letters"))
    return found + _drawn([*behind, *_of_workers(workers)])


def _of_workers(workers: Mapping[str, History]) -> list[tuple[str, str, list[Series]]]:
    depths = [worker.level(name, "events", "queue_depth") for name, worker in workers.items()]
    return [
        ("handled", "Handled by workers", [worker.rate(name, "handled") for name, worker in workers.items()]),
        (
            "failed",
            "Attempts that failed",
            [worker.rate(name, "retried", "dead_lettered", "crashed") for name, worker in workers.items()],
        ),
        (
            "durations",
            "Durations of attempts",
            [
                worker.quantile(f"{name}, {words}", q)
                for name, worker in workers.items()
                for words, q in (("median", 0.5), ("99 %", 0.99))
            ],
        ),
        (
            "in-hand",
            "In hand, on average",
            [worker.mean(name, "events", "in_hand") for name, worker in workers.items()],
        ),
        # Pub/Sub does not tell.
        ("queue", "Waiting in the queue", [at for at in depths if any(value is not None for value in at.values)]),
    ]


def _drawn(wanted: Sequence[tuple[str, str, list[Series]]]) -> list[Markup]:
    return [chart(f"chart-{name}", title, series) for name, title, series in wanted if series]
