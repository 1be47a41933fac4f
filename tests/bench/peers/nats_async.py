"""nats-py's publish_async at its best: messages made before the clock starts, thousands of acks outstanding."""

import asyncio
import json
import sys
import time

import nats
import uvloop

from bridge.brokers.nats.message import subject_of
from bridge.event import attributes
from tests.bench.peers.log import events

PENDING = 4_000
"""Most acks outstanding, which is the client's own default."""


async def main(url: str, stream_name: str, dsn: str, count: int) -> None:
    messages = [
        (subject_of(stream_name, event.topic), event.payload, {"Nats-Msg-Id": event.id, **attributes(event)})
        for event in events(dsn, count)
    ]
    connection = await nats.connect(url, pending_size=64 * 1024 * 1024)
    stream = connection.jetstream(publish_async_max_pending=PENDING)
    began = time.perf_counter()
    answers = [await stream.publish_async(subject, payload, headers=headers) for subject, payload, headers in messages]
    await asyncio.gather(*answers)
    print(json.dumps({"messages": count, "seconds": time.perf_counter() - began}))
    await connection.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
