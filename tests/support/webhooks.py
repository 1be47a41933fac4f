"""Webhooks as their processes use the database, over one connection; and time that goes by, for what takes days."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self
from uuid import uuid4

import psycopg
from psycopg.rows import dict_row, namedtuple_row

SCHEDULE = [5.0, 300.0, 1800.0]


class Claim(NamedTuple):
    delivery: int
    attempt: int
    endpoint: int


class Webhooks:
    """One session, as of a process, or of a person."""

    def __init__(self, dsn: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def one(self, query: str, *parameters: object) -> Any:
        """The one value that it gives."""
        [(value,)] = self.rows(query, *parameters)
        return value

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self.connection.execute(query.encode(), parameters).fetchall()

    def add(self, topics: str = "{#}", url: str = "https://example.com/hook", **fields: object) -> int:
        """A new endpoint's id."""
        named = "".join(f", {name} => %({name})s" for name in fields)
        cursor = self.connection.execute(
            f"select endpoint from bridge.add_endpoint(%(url)s, %(topics)s{named})".encode(),
            {"url": url, "topics": topics, **fields},
        )
        [(endpoint,)] = cursor.fetchall()
        return int(endpoint)

    def emit(self, count: int = 1, topic: str = "shop.order", body: str = "{}") -> list[str]:
        """Events that are fanned out; their ids."""
        events = [str(uuid4()) for _ in range(count)]
        for event in events:
            self.connection.execute(
                "select bridge.webhook_fan_out(%s, jsonb_build_object('topic', %s::text, 'key', null,"
                " 'time', '2026-02-03T04:05:06Z', 'body', %s::text))",
                [event, topic, body],
            )
        return events

    def claim(
        self, room: int = 100, lease: float = 60.0, bytes_room: int = 10**9, in_hand: Sequence[Claim] = ()
    ) -> list[Claim]:
        found = self.rows(
            "select delivery, attempt, endpoint from bridge.webhook_claim(%s, %s, %s, %s::bigint[])",
            *(room, bytes_room, lease, [claim.delivery for claim in in_hand]),
        )
        return [Claim(*row) for row in found]

    def record(
        self,
        claims: Sequence[Claim],
        status: int | None = 200,
        *,
        retry_after: float | None = None,
        schedule: Sequence[float] = SCHEDULE,
        answer: str = "",
    ) -> list[str]:
        """The same outcome for all of them; what became of each, in their order."""
        count = len(claims)
        found = self.connection.execute(
            "select delivery, state from bridge.webhook_record("
            "%s::bigint[], %s::int[], %s::int[], %s::float8[], %s::text[], %s::text[], %s::float8[], %s::float8[])",
            [
                [claim.delivery for claim in claims],
                [claim.attempt for claim in claims],
                [status] * count,
                [0.1] * count,
                [""] * count,
                [answer] * count,
                [retry_after] * count,
                list(schedule),
            ],
        ).fetchall()
        states: dict[int, str] = dict(found)
        return [states[claim.delivery] for claim in claims]

    def fail(self, times: int, status: int = 500, **how: Any) -> None:
        """So many claims of one delivery that fail, each as soon as it may."""
        for _ in range(times):
            self.make_due()
            [claim, *_] = self.claim(1)
            self.record([claim], status, **how)

    def next_due(self) -> float | None:
        seconds: float | None = self.one("select bridge.webhook_next()")
        return seconds

    def endpoint(self, endpoint: int) -> Any:
        cursor = self.connection.cursor(row_factory=namedtuple_row)
        return cursor.execute("select * from bridge.webhook_endpoints where id = %s", [endpoint]).fetchone()

    def delivery(self, delivery: int) -> dict[str, Any]:
        cursor = self.connection.cursor(row_factory=dict_row)
        found = cursor.execute(
            "select *, extract(epoch from due_at - clock_timestamp())::float8 as due_in from bridge.webhook_delivery"
            " where id = %s",
            [delivery],
        ).fetchone()
        assert found is not None
        return found

    def states(self, endpoint: int) -> dict[str, int]:
        """How many deliveries are in which state."""
        return dict(
            self.connection.execute(
                "select state, count(*)::int from bridge.webhook_delivery where endpoint = %s group by state",
                [endpoint],
            ).fetchall()
        )

    def make_due(self) -> None:
        """As if all delays until the next attempts were over, and those of circuit breakers and pauses."""
        self.connection.execute("update bridge.webhook_delivery set due_at = clock_timestamp() where state = 'due'")
        self.connection.execute(
            "update bridge.webhook_endpoint set paused_until = null, next_start_at = null,"
            " open_until = case when open_until is not null then clock_timestamp() end"
        )

    def end_leases(self) -> None:
        """As if the time of all claims were over."""
        self.connection.execute("update bridge.webhook_delivery set due_at = clock_timestamp() where state = 'sending'")

    def pass_time(self, hours: float) -> None:
        """As if so much time had gone by since everything that happened."""
        self.connection.execute(
            "update bridge.webhook_endpoint set failing_since = failing_since - make_interval(secs => %(s)s),"
            " last_apart_at = last_apart_at - make_interval(secs => %(s)s)",
            {"s": hours * 3600},
        )
        self.connection.execute(
            "update bridge.webhook_delivery set finished_at = finished_at - make_interval(secs => %(s)s)",
            {"s": hours * 3600},
        )
