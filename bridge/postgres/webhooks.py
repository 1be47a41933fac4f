"""Webhooks as people look at them and mend them: endpoints, deliveries, attempts; and sending again.

Sending itself is a worker's, ``workers.webhooks``; its SQL is in ``0018_webhooks.sql``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString, TypeVar

import psycopg
from psycopg.rows import class_row

from bridge.errors import UsageError
from bridge.postgres.connection import DSN_KEY, answered
from bridge.postgres.wire import Connection
from bridge.process.terminal import age

T = TypeVar("T")

_OF_THE_CALLER: Final = (
    psycopg.errors.InvalidParameterValue,
    psycopg.errors.NullValueNotAllowed,
    psycopg.errors.NoDataFound,
    psycopg.errors.ObjectInUse,
    psycopg.errors.ObjectNotInPrerequisiteState,
)
"""What the functions raise over what they are given."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where webhooks go. It has no secret: those are shown once, to whoever adds an endpoint."""

    id: int
    url: str
    topics: list[str]
    description: str
    concurrency: int
    rate: float | None
    """Requests a second at most; None: no limit."""
    created_at: datetime
    disabled_at: datetime | None
    disabled_why: str | None
    breaker: str
    """``closed``, ``open``, ``half open``."""
    failures: int
    """In a row."""
    open_until: datetime | None
    paused_until: datetime | None
    """Until when it asked to be left alone."""
    failing_since: datetime | None
    last_success_at: datetime | None
    due: int
    sending: int
    failed: int
    skipped: int

    def words(self, now: datetime) -> str:
        """How it is, the gravest first."""
        if self.disabled_at is not None:
            return f"disabled: {self.disabled_why}"
        if self.breaker == "open" and self.open_until is not None:
            return f"failing, next try in {age((self.open_until - now).total_seconds())}"
        if self.paused_until is not None and self.paused_until > now:
            return f"asked to wait {age((self.paused_until - now).total_seconds())}"
        if self.breaker == "half open":
            return "failing, tried one by one"
        return "failing" if self.failing_since is not None else "ok"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message on its way to an endpoint, or what became of it."""

    id: int
    event_id: str
    topic: str
    key: str | None
    state: str
    """``due``, ``sending``, ``done``, ``failed``, ``skipped``."""
    attempts: int
    due_at: datetime | None
    """When it is sent, or when the claim of whoever sends it ends."""
    last_status: int | None
    last_error: str | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Message(Delivery):
    """A delivery with what is sent."""

    endpoint: int
    event_time: datetime
    body: str
    size: int
    """Bytes of all of the body."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of a delivery."""

    number: int
    at: datetime
    status: int | None
    """None where no answer came."""
    duration: float | None
    """Seconds; None where its process did not say what came of it."""
    error: str
    answer: str
    """Its beginning."""


@dataclass(frozen=True, slots=True)
class Recoverable:
    """Deliveries that `recover` would send again."""

    failed: int
    skipped: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.failed + self.skipped


async def endpoints(
    connection: Connection, after: int = 0, most: int | None = None, count_to: int | None = None
) -> list[Endpoint]:
    """Those with a greater id than `after`, `most` of them; their deliveries are counted up to `count_to` of each
    state. None: all.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    return await _all(
        connection, Endpoint,
        "select id, url, topics, description, concurrency, rate, created_at, disabled_at, disabled_why, breaker, "
        "failures, open_until, paused_until, failing_since, last_success_at, due, sending, failed, skipped "
        "from bridge.list_endpoints(%s, %s, %s)",
        after, most, count_to,
    )  # fmt: skip


async def endpoint(connection: Connection, number: int, count_to: int | None = None) -> Endpoint | None:
    """The one with this id; None where there is none. Raises as `endpoints`."""
    found = await endpoints(connection, number - 1, 1, count_to)
    return found[0] if found and found[0].id == number else None


async def deliveries(connection: Connection, number: int, most: int) -> list[Delivery]:
    """What is sent and due next at an endpoint, and what was finished there last: `most` of each. Raises as
    `endpoints`."""
    return await _all(
        connection, Delivery,
        "select id, event_id::text, topic, key, state, attempts, due_at, last_status, last_error, created_at, "
        "finished_at from bridge.endpoint_deliveries(%s, %s)",
        number, most,
    )  # fmt: skip


async def delivery(connection: Connection, number: int, most: int | None = None) -> Message | None:
    """The one with this id, with `most` characters of its body (None: all); None where there is none. Raises as
    `endpoints`."""
    found = await _all(
        connection, Message,
        "select d.id, d.endpoint, d.event_id::text, m.topic, m.key, d.state, d.attempts, d.due_at, d.last_status, "
        "d.last_error, d.created_at, d.finished_at, m.event_time, "
        "case when %s::int is null then m.body else left(m.body, %s::int) end as body, m.size "
        "from bridge.webhook_delivery d join bridge.webhook_message m using (event_id) where d.id = %s",
        most, most, number,
    )  # fmt: skip
    return found[0] if found else None


async def attempts(connection: Connection, number: int, most: int | None = None) -> list[Attempt]:
    """Of one delivery, the latest `most` (None: all), in their order. Raises as `endpoints`."""
    found = await _all(
        connection, Attempt,
        "select number, at, status, duration, error, answer from bridge.webhook_attempt where delivery = %s "
        "order by number desc limit %s",
        number, most,
    )  # fmt: skip
    return found[::-1]


async def resend(connection: Connection, number: int) -> None:
    """Makes one delivery due now, whatever became of it, with its whole schedule of attempts. Raises as `asked`."""
    await asked(connection, "select bridge.resend_delivery(%s)", number)


async def enable(connection: Connection, number: int) -> bool:
    """Sends an endpoint what comes from now on; False where it was enabled. Raises as `asked`."""
    [(was_disabled,)] = await asked(connection, "select bridge.enable_endpoint(%s)", number)
    return bool(was_disabled)


async def recoverable(connection: Connection, number: int, since: datetime, count_to: int | None = None) -> Recoverable:
    """What `recover` would make due, counted up to `count_to` of each kind. Raises as `asked`."""
    [counts] = await asked(
        connection, "select failed, skipped from bridge.count_recoverable(%s, %s, %s)", number, since, count_to
    )
    return Recoverable(*counts)


async def recover(connection: Connection, number: int, since: datetime) -> int:
    """Enables an endpoint, and makes due what failed for good or was skipped since then; how many those are. Raises as
    `asked`."""
    [(count,)] = await asked(connection, "select bridge.recover_endpoint(%s, %s)", number, since)
    return int(count)


async def asked(connection: Connection, query: LiteralString, *parameters: object) -> Sequence[tuple[Any, ...]]:
    """What a function for people gives.

    Raises UsageError for what the database does not take of what it was given, with the way to mend it; and
    DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    with answered(connection, DSN_KEY), _told():
        cursor = await connection.execute(query, parameters)
        return await cursor.fetchall()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except _OF_THE_CALLER as error:
        hint = f". {error.diag.message_hint}" if error.diag.message_hint else ""
        raise UsageError(f"{error.diag.message_primary}{hint}") from error


async def _all(connection: Connection, kind: type[T], query: LiteralString, *parameters: object) -> list[T]:
    with answered(connection):
        async with connection.cursor(row_factory=class_row(kind)) as cursor:
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
