"""Dead letters for tests: rows of the outbox, and messages in the queue of a worker's dead letters on RabbitMQ."""

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import uuid4

import aio_pika

from bridge.brokers.contract import Failure
from bridge.brokers.letters import letter_headers
from bridge.event import AMQP_PREFIX, Event, attributes
from tests.support.messages import execute

ROWS = """
insert into bridge.dead_letter
  (bridge, event_id, sequence, topic, key, payload, content_type, headers, created_at, sink, code, reason, attempts,
   failed_at)
select 'test', gen_random_uuid(), n, %s, 'k', '{"n": ' || n || '}', 'application/json', '{"tenant": "a"}', now(), %s,
       %s, format(%s, n), 2, now() - (n - 1) * interval '30 minutes'
from generate_series(1, %s) n
"""
"""Topic, sink, code, reason with a place for its number, and how many."""


async def bury(
    dsn: str, count: int, sink: str | None, code: str, reason: str, topic: str = "shop.order.placed"
) -> None:
    """Letters of the outbox, half an hour between two; the newest has just come."""
    await execute(dsn, ROWS, topic, sink, code, reason, count)


async def give_up(
    connection: aio_pika.abc.AbstractConnection, worker: str, payloads: Sequence[bytes], failure: Failure
) -> list[str]:
    """Letters of a worker, as it makes them; gives the ids of their events. Its queues need not be there."""
    channel = await connection.channel()
    for queue in (worker, f"{worker}.dead"):
        await channel.declare_queue(queue, durable=True)
    ids = []
    for payload in payloads:
        event = Event(
            id=str(uuid4()), topic="shop.invoice.requested", payload=payload, key="k", source="/shop/test",
            time=datetime.now(UTC), content_type="text/plain", headers={},
        )  # fmt: skip
        message = aio_pika.Message(
            payload,
            message_id=event.id,
            content_type=event.content_type,
            headers={**attributes(event, AMQP_PREFIX), **letter_headers(worker, failure, 3)},
        )
        await channel.default_exchange.publish(message, f"{worker}.dead")
        ids.append(event.id)
    await channel.close()
    return ids
