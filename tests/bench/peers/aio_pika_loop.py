"""An outbox relay as it is often written: psycopg reads a page, aio-pika publishes it, the cursor is stored.

`one` awaits each publish; `gather` awaits those of a page together. Both run on uvloop.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aio_pika
import psycopg
import uvloop

PAGE = 1000
SOURCE = "/bench/aio-pika"


def message(row: tuple[Any, ...]) -> aio_pika.Message:
    _, event_id, topic, key, payload, content_type, created_at = row
    return aio_pika.Message(
        payload.encode(),
        message_id=event_id,
        app_id=SOURCE,
        content_type=content_type,
        timestamp=created_at,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        headers={
            "cloudEvents_specversion": "1.0",
            "cloudEvents_id": event_id,
            "cloudEvents_type": topic,
            "cloudEvents_source": SOURCE,
            "cloudEvents_time": created_at.isoformat(),
            "cloudEvents_subject": key,
        },
    )


async def main(url: str, exchange_name: str, dsn: str, count: int, way: str) -> None:
    async with (
        await aio_pika.connect(url) as connection,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as database,
    ):
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange = await channel.get_exchange(exchange_name)
        await database.execute("create table if not exists public.aio_cursor (name text primary key, mark bigint)")
        await database.execute("insert into public.aio_cursor values ('bench', 0) on conflict do nothing")
        began = time.perf_counter()
        mark = done = 0
        while done < count:
            rows = await (
                await database.execute(
                    "select id, event_id::text, topic, key, payload, content_type, created_at from bridge.outbox "
                    "where id > %s order by id limit %s",
                    (mark, min(PAGE, count - done)),
                )
            ).fetchall()
            if not rows:
                raise RuntimeError(f"the log ended after {done} events")
            if way == "gather":
                await asyncio.gather(*(exchange.publish(message(row), row[2], mandatory=True) for row in rows))
            else:
                for row in rows:
                    await exchange.publish(message(row), row[2], mandatory=True)
            mark = rows[-1][0]
            done += len(rows)
            await database.execute("update public.aio_cursor set mark = %s where name = 'bench'", (mark,))
        print(json.dumps({"messages": done, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]))
