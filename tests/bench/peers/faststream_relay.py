"""faststream-outbox with FastStream's RabbitMQ publisher, over a backlog in its own table.

Its settings are generous: many workers, large batches, terminal deletes in groups, and no pause between fetches.
"""

import asyncio
import json
import logging
import sys
import time
from typing import Any

import uvloop
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData, func, insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine

WORKERS = 32
BATCH = 200
QUEUE = "bench"


async def main(url: str, exchange_name: str, dsn: str, count: int) -> None:
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"), pool_size=WORKERS + 4)
    metadata = MetaData()
    table = make_outbox_table(metadata, table_name="faststream_outbox")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
        # The same payloads; every row carries the headers that its own publish() would write.
        rows = select(
            text(f"'{QUEUE}'"),
            text("convert_to(payload, 'UTF8')"),
            text("jsonb_build_object('correlation_id', event_id::text, 'cloudEvents_id', event_id::text)"),
        ).select_from(text("(select * from bridge.outbox order by id limit :count) as log"))
        await connection.execute(
            insert(table).from_select([table.c.queue, table.c.payload, table.c.headers], rows), {"count": count}
        )
    async with engine.connect() as connection:
        await (await connection.execution_options(isolation_level="AUTOCOMMIT")).execute(
            text("vacuum analyze faststream_outbox")
        )

    outbox = OutboxBroker(engine, outbox_table=table, logger=None)
    rabbit = RabbitBroker(url, logger=None)
    exchange = RabbitExchange(exchange_name, type=ExchangeType.TOPIC, durable=True)
    publisher = rabbit.publisher(exchange=exchange, routing_key="bench.event.0", persist=True, mandatory=True)
    finished = asyncio.Event()
    handled = 0

    @publisher  # type: ignore[untyped-decorator]
    @outbox.subscriber(  # type: ignore[untyped-decorator]
        QUEUE,
        max_workers=WORKERS,
        fetch_batch_size=BATCH,
        min_fetch_interval=0.001,
        max_fetch_interval=0.01,
        terminal_flush_batch_size=BATCH,
        propagate_inbound_headers=True,
    )
    async def relay(body: dict[str, Any]) -> dict[str, Any]:
        nonlocal handled
        handled += 1
        if handled >= count:
            finished.set()
        return body

    await rabbit.connect()
    began = time.perf_counter()
    await outbox.start()
    async with asyncio.timeout(60):
        await finished.wait()
        # Done when the last rows are published and deleted.
        async with engine.connect() as connection:
            while (await connection.execute(select(func.count()).select_from(table))).scalar_one():
                await connection.rollback()
                await asyncio.sleep(0.005)
    seconds = time.perf_counter() - began
    print(json.dumps({"messages": count, "seconds": seconds}))
    await outbox.stop()
    await rabbit.stop()
    await engine.dispose()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
