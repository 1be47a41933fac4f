"""The emulator's limit: PublishRequests that were serialised before the clock starts, many at once over grpc.aio."""

import asyncio
import json
import sys
import time
from collections.abc import Iterator

import grpc
import uvloop
from google.pubsub_v1.types import PublishRequest, PubsubMessage, Topic

from bridge.event import attributes
from tests.bench.peers.log import events

BATCH = 1000
IN_FLIGHT = 16


async def main(address: str, project: str, topic_id: str, dsn: str, count: int) -> None:
    topic = f"projects/{project}/topics/{topic_id}"
    messages = [PubsubMessage(data=event.payload, attributes=attributes(event)) for event in events(dsn, count)]
    requests = [
        PublishRequest.serialize(PublishRequest(topic=topic, messages=messages[start : start + BATCH]))
        for start in range(0, count, BATCH)
    ]
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.unary_unary("/google.pubsub.v1.Publisher/CreateTopic")(Topic.serialize(Topic(name=topic)))
        call = channel.unary_unary("/google.pubsub.v1.Publisher/Publish")
        waiting: Iterator[bytes] = iter(requests)

        async def publish() -> None:
            for request in waiting:
                await call(request)

        began = time.perf_counter()
        await asyncio.gather(*(publish() for _ in range(IN_FLIGHT)))
        print(json.dumps({"messages": count, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])))
