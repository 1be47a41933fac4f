"""A FastStream consumer that handles each message once, with the inserts of inserts.py; until SIGTERM."""

import asyncio
import sys
from typing import Any

import uvloop
from faststream import AckPolicy
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue

from tests.bench.peers.inserts import CONCURRENCY, PREFETCH, handle, inserts, until_sigterm


async def main(url: str, queue_name: str, dsn: str, reply: bool) -> None:
    slots = asyncio.Semaphore(CONCURRENCY)
    broker = RabbitBroker(url, logger=None)
    async with inserts(dsn) as inbox:

        @broker.subscriber(  # type: ignore[untyped-decorator]
            RabbitQueue(queue_name, declare=False),
            channel=Channel(prefetch_count=PREFETCH, publisher_confirms=False),
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )
        async def on_message(body: dict[str, Any], message: RabbitMessage) -> None:
            # FastStream runs this as a task for each message.
            async with slots:
                if await inbox.claim(message.message_id):
                    await inbox.finish(message.message_id, await handle(reply))

        await broker.start()
        await until_sigterm()
        await broker.stop()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "reply"))
