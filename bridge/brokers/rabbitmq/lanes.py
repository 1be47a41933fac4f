"""How the keys of an ordered worker are spread over several queues, each of which one process has at a time.

The sink stamps every message with a lane, one of LANES; a worker with N queues binds lane n to queue n mod N. So a key
is in one queue, and no plugin is needed. A message of another program has no lane, and goes to the first queue.
"""

from typing import Final
from zlib import crc32

from bridge.event import AMQP_PREFIX

LANES: Final = 64
"""How many there are. It never changes: events of one key would be in two queues."""

LANE: Final = f"{AMQP_PREFIX}lane"
"""The header with the lane, two digits. No part of the event."""

TEXTS: Final = tuple(f"{lane:02}" for lane in range(LANES))
"""The lanes, as the header has them."""


def lane_of(key: bytes) -> int:
    """The lane of a key; of an event without one, that of its id, since any will do."""
    return crc32(key) % LANES
