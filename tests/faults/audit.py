"""Takes every message from a queue that is bound to everything, and notes repeats and order."""

import asyncio
import json
from collections import Counter, defaultdict

import aio_pika
from aio_pika.exceptions import AMQPError

EXCHANGE = "faults"
QUEUE = "faults-audit"


class Audit:
    """What has arrived at the broker."""

    def __init__(self, url: str, exchange: str = EXCHANGE, queue: str = QUEUE) -> None:
        self._url = url
        self._exchange = exchange
        self._queue = queue
        self.first_at: dict[str, float] = {}
        """When each event was seen first, by the loop's clock."""
        self.duplicates: Counter[str] = Counter()
        """Repeats of an event that the bridge published again; what the broker only delivered again is left out."""
        self.order_violations = 0
        self._last: defaultdict[str, int] = defaultdict(int)
        self._arrived = asyncio.Condition()
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Consumes until it is cancelled; an outage of the broker is waited out."""
        while True:
            try:
                await self._consume()
            except (AMQPError, OSError, RuntimeError, TimeoutError):
                # aio-pika raises any of these when the connection goes, by the moment in which it goes.
                await asyncio.sleep(0.1)

    async def _consume(self) -> None:
        connection = await aio_pika.connect(f"{self._url}?heartbeat=5", timeout=5)
        try:
            channel = await connection.channel()
            await channel.set_qos(100)  # few, since the place of what is delivered again cannot be told
            exchange = await channel.declare_exchange(self._exchange, "topic", durable=True)
            queue = await channel.declare_queue(self._queue, durable=True, arguments={"x-queue-type": "quorum"})
            await queue.bind(exchange, "#")
            self.ready.set()
            async with queue.iterator() as messages:
                async for message in messages:
                    await self._note(message)
                    await message.ack()
        finally:
            await connection.close()

    async def _note(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        event_id = str(message.message_id)
        if event_id in self.first_at:
            if not message.redelivered:
                self.duplicates[event_id] += 1
            return
        self.first_at[event_id] = asyncio.get_running_loop().time()
        key, number = str(message.headers["cloudEvents_subject"]), int(json.loads(message.body)["n"])
        # What a lost connection had in hand comes again behind newer messages, whatever its place in the queue was.
        # Whatever else came before this one was published before it, so the check still finds every overtaking.
        if number <= self._last[key] and not message.redelivered:
            self.order_violations += 1
        self._last[key] = max(number, self._last[key])
        async with self._arrived:
            self._arrived.notify_all()

    async def seen(self, event_ids: set[str], limit: float) -> set[str]:
        """Waits until these have arrived; gives those that have not within `limit` seconds."""
        try:
            async with asyncio.timeout(limit), self._arrived:
                await self._arrived.wait_for(lambda: event_ids <= self.first_at.keys())
        except TimeoutError:
            return event_ids - self.first_at.keys()
        return set()
