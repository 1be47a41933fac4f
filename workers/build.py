"""From the settings to a worker, and to what it wants of its broker."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from bridge.brokers.contract import Subscription
from bridge.brokers.registry import broker_of
from bridge.errors import SettingsError
from bridge.settings import Settings, SinkSettings, WorkerSettings
from workers.attempt import retry_delays
from workers.inbox import Inbox
from workers.loading import load_handler, require_reply
from workers.settle import BUSY_DELAY
from workers.worker import Worker

if TYPE_CHECKING:
    from bridge.process.spans import Spans
    from workers.traced import AttemptSpans

LEASE: Final = 30.0
"""Seconds after which a crashed worker's deliveries go to another one; a living one's queue extends them."""

_COARSE_DELAYS: Final = (60.0, 600.0)
"""Seconds; rungs of every ladder, beside BUSY_DELAY, so that a long delay takes few rounds."""

_REMEMBERED: Final = timedelta(days=30)
"""How long finished events are remembered at least."""


def subscription(name: str, settings: WorkerSettings, topics: Sequence[str]) -> Subscription:
    """What a worker with these settings wants of its broker; `topics` are those of its handler.

    Raises SettingsError where neither names a topic.
    """
    if not (settings.subscribe or topics):
        raise SettingsError(f"workers.{name}.subscribe: the handler names no topics, so the settings must")
    prefetch = settings.prefetch or 2 * settings.concurrency
    return Subscription(
        worker=name,
        topics=settings.subscribe or list(topics),
        prefetch=prefetch,
        retry_delays=sorted({BUSY_DELAY, *retry_delays(settings), *_COARSE_DELAYS}),
        max_attempts=settings.max_attempts,
        ack_wait=LEASE,
        start=settings.start,
        ordered=settings.ordered,
        holds=settings.holds,
        lanes=settings.lanes,
    )


def subscriptions(settings: Settings) -> Mapping[str, tuple[str, Subscription]]:
    """By worker, the name of its sink and what it wants of that sink's broker. Raises SettingsError.

    `pgbridge topology` and `check` get it through the entry points of the group ``pgbridge.subscriptions``.
    """
    return {
        name: (
            settings.sink_of(name),
            subscription(name, worker, load_handler(worker.handler, name, worker.path).topics),
        )
        for name, worker in settings.workers.items()
    }


def make_inbox(name: str, settings: Settings) -> Inbox:
    """The inbox of the worker `name`, not yet open."""
    own = settings.workers[name]
    return Inbox(
        name,
        settings.workers_postgres,
        concurrency=own.concurrency,
        reply=own.reply,
        reply_timeout=own.reply_timeout,
        backoff=retry_delays(own),
        holds=own.holds,
    )


def build(name: str, settings: Settings, spans: "Spans | None" = None) -> Worker:
    """The worker `name`, ready to run; `spans` record what belongs to sampled traces.

    Raises UsageError for an unknown name, SettingsError for wrong settings.
    """
    own = settings.worker(name)
    handler = load_handler(own.handler, name, own.path)
    sink = settings.sinks[settings.sink_of(name)]
    run = handler.configured(own.options, name)
    require_reply(name, own, handler)
    broker = broker_of(sink)
    wanted = subscription(name, own, handler.topics)
    kept = timedelta(seconds=2 * settings.outbox.retention) if settings.outbox else _REMEMBERED
    return Worker(
        name,
        own,
        run,
        partial(broker.queue, sink, wanted),
        make_inbox(name, settings),
        keep_finished=max(kept, _REMEMBERED),
        spans=_attempt_spans(name, sink, spans),
    )


def _attempt_spans(name: str, sink: SinkSettings, spans: "Spans | None") -> "AttemptSpans | None":
    if spans is None:
        return None
    from workers.traced import AttemptSpans

    return AttemptSpans(name, sink, spans)
