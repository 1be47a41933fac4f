"""What the database says about the run: numbers for the screen, and the evidence for the final count."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import class_row, dict_row


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts at one moment."""

    orders: int = 0
    events: int = 0
    """Events in the log."""
    invoices: int = 0
    """Invoices whose PDF the worker has reported."""
    payments: int = 0
    """Orders that are paid, as the worker has reported."""
    deliveries: int = 0
    """Webhooks of which it is on record that the partner took them."""
    unpublished: int = 0
    """Dead letters of the bridge."""
    p50: float | None = None
    """Median milliseconds from the request in the log to the stored reply, both by the database's clock."""
    p99: float | None = None


_FIGURES: Final = """
select (select count(*) from shop.orders) as orders,
       (select count(*) from bridge.outbox) as events,
       (select count(*) from shop.invoices where rendered_at is not null) as invoices,
       (select count(*) from shop.payments where status = 'succeeded') as payments,
       (select count(*) from bridge.webhook_delivery where state = 'done') as deliveries,
       (select count(*) from bridge.dead_letter) as unpublished,
       latency[1] as p50, latency[2] as p99
from (
    select percentile_disc(array[0.5, 0.99]) within group (
        order by extract(epoch from i.rendered_at - o.created_at)::float * 1000) as latency
    from shop.invoices as i join bridge.outbox as o on o.event_id = i.request
) as measured
"""

# Sent: the stock events that crossed the level downwards, as the trigger's condition has it.
_WARNINGS: Final = """
select (select count(*) from bridge.outbox as o join shop.stock as s on s.sku = o.key,
               lateral (select o.payload::jsonb as p) as read
        where o.topic = 'shop.stock.updated' and (p -> 'new' ->> 'quantity')::int < s.reorder_level
          and (p -> 'old' ->> 'quantity')::int >= s.reorder_level),
       (select count(*) from bridge.outbox where topic = 'Low Stock')
"""


class FiguresReader:
    """Reads the figures as superuser; while the database is down it gives the last ones."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: AsyncConnection[Any] | None = None
        self.last = Figures()

    async def read(self) -> Figures:
        """The figures now, or the last ones during an outage."""
        try:
            connection = await self._connected()
            async with connection.cursor(row_factory=class_row(Figures)) as cursor:
                self.last = await (await cursor.execute(_FIGURES)).fetchone() or self.last
        except psycopg.OperationalError:
            await self.close()
        return self.last

    async def event_ids(self) -> set[str]:
        """The ids of all events in the log. Raises psycopg.OperationalError during an outage."""
        rows = await (await (await self._connected()).execute("select event_id::text from bridge.outbox")).fetchall()
        return {row[0] for row in rows}

    async def warnings(self) -> tuple[int, int]:
        """How many plain notifications `Low Stock` were sent, and how many of them the bridge heard."""
        row = await (await (await self._connected()).execute(_WARNINGS)).fetchone()
        return (0, 0) if row is None else (row[0], row[1])

    async def invoices_without_pdf(self) -> list[str]:
        """Numbers of invoices that were asked for and whose file is not as the database says: size, SHA-256."""
        async with (await self._connected()).cursor(row_factory=dict_row) as cursor:
            await cursor.execute("select number, path, bytes, sha256 from shop.invoices order by number")
            return [row["number"] for row in await cursor.fetchall() if not _stands(row)]

    async def owed(self) -> dict[str, int]:
        """By order, its total in cents. Raises psycopg.OperationalError during an outage."""
        found = await (await self._connected()).execute("select number, (total * 100)::bigint from shop.orders")
        return dict(await found.fetchall())

    async def close(self) -> None:
        """Disconnects; the next call connects again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connected(self) -> AsyncConnection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = await AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=5)
        return self._connection


def _stands(row: dict[str, Any]) -> bool:
    path = Path(row["path"]) if row["path"] else None
    if path is None or not path.is_file():
        return False
    content = path.read_bytes()
    return (len(content), hashlib.sha256(content).hexdigest()) == (row["bytes"], row["sha256"])
