"""google-cloud-pubsub's own threaded publisher, with the largest batches: `keys` orders by key, `plain` does not.

The address comes from PUBSUB_EMULATOR_HOST, as the library has it.
"""

import json
import sys
import time

from google.cloud import pubsub_v1

from bridge.event import attributes
from tests.bench.peers.log import events


def main(project: str, topic_id: str, dsn: str, count: int, way: str) -> None:
    messages = [(event.payload, attributes(event), event.key or "") for event in events(dsn, count)]
    client = pubsub_v1.PublisherClient(
        batch_settings=pubsub_v1.types.BatchSettings(max_messages=1000, max_bytes=2_000_000, max_latency=0.01),
        publisher_options=pubsub_v1.types.PublisherOptions(enable_message_ordering=way == "keys"),
    )
    topic = client.topic_path(project, topic_id)
    client.create_topic(name=topic)
    began = time.perf_counter()
    ordered = way == "keys"
    futures = [
        client.publish(topic, payload, ordering_key=key if ordered else "", **headers)
        for payload, headers, key in messages
    ]
    for future in futures:
        future.result(timeout=120)
    print(json.dumps({"messages": count, "seconds": time.perf_counter() - began}))
    client.stop()


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6])
