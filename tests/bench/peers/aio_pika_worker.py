"""A consumer on plain aio-pika that handles each message once, with the inserts of inserts.py; until SIGTERM."""

import asyncio
import sys

import aio_pika
import uvloop
from aio_pika.abc import AbstractIncomingMessage

from tests.bench.peers.inserts import CONCURRENCY, PREFETCH, handle, inserts, until_sigterm


async def main(url: str, queue_name: str, dsn: str, reply: bool) -> None:
    slots = asyncio.Semaphore(CONCURRENCY)
    async with inserts(dsn) as inbox, await aio_pika.connect(url) as connection:

        async def on_message(message: AbstractIncomingMessage) -> None:
            # aio-pika runs this as a task for each message.
            async with slots, message.process(requeue=True):
                event_id = message.message_id
                if event_id is None:
                    raise RuntimeError("a message without an id")
                if await inbox.claim(event_id):
                    await inbox.finish(event_id, await handle(reply))

        channel = await connection.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(queue_name, ensure=False)
        tag = await queue.consume(on_message)
        await until_sigterm()
        await queue.cancel(tag)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "reply"))
