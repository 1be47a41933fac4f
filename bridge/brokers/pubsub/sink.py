"""Google Cloud Pub/Sub as a sink: one topic, the event's key as the ordering key, confirms by request.

`message` encodes events, `requests` sends them; this file opens both, looks at the topic, and notices a lost service.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, cast

import grpc
import structlog

from bridge.brokers.contract import Declaration, NotSent, Outcome, Unsendable
from bridge.brokers.pubsub import permissions, resources
from bridge.brokers.pubsub.connection import Connection, connect
from bridge.brokers.pubsub.message import Encoder
from bridge.brokers.pubsub.requests import Requests
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.errors import PrivilegeError, TopologyError
from bridge.event import Event

log = structlog.get_logger()


class PubSubSink:
    """Publishes to one topic. See `bridge.brokers.contract.Sink`."""

    def __init__(self, settings: PubSubSettings) -> None:
        self._settings = settings
        self._topic = f"projects/{settings.project}/topics/{settings.topic}"
        self._needs = [permissions.publish_to(self._topic)]
        self._encoder = Encoder(ordering=settings.ordering, max_payload=settings.max_message_bytes)
        self._requests: Requests | None = None
        self._watching: list[asyncio.Task[None]] = []

    @property
    def is_open(self) -> bool:
        """See `contract.Sink.is_open`."""
        return self._requests is not None and self._requests.broken is None

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        return None if self._requests is None else self._requests.stalled

    @property
    def pipelines(self) -> bool:
        """See `contract.Sink.pipelines`. A key has one request in flight, however many of its events are given."""
        return True

    async def open(self) -> None:
        """See `contract.Sink.open`. Raises as `connect` does, too, and PrivilegeError for who may not publish."""
        if self.is_open:
            return
        await self.close()
        connection = await connect(self._settings)
        try:
            await self._check_topic(connection)
        except BaseException:
            await connection.close()
            raise
        self._requests = Requests(self._settings, connection, self._topic)
        watches = (_watch(connection, self._requests), self._requests.watch())
        self._watching = [asyncio.create_task(watch) for watch in watches]

    async def _check_topic(self, connection: Connection) -> None:
        topic = await self._found_topic(connection)
        if topic is not None and not await resources.keeps_messages(connection, topic):
            log.warning("pubsub.messages_not_kept", topic=self._settings.topic, reason=resources.NOT_KEPT)

    async def _found_topic(self, connection: Connection) -> Any | None:
        """The Topic; None where these credentials may publish to it and not look at it. Raises TopologyError."""
        try:
            topic = await resources.find_topic(connection, self._topic)
        except PrivilegeError:
            # Who may only publish cannot look, and need not.
            await permissions.require(connection, self._needs)
            return None
        if topic is None:
            raise TopologyError(
                f"{connection.at('topic')} has no topic {self._settings.topic!r} in project "
                f"{self._settings.project!r}, or no such project: run `pgbridge topology --apply`"
            )
        return topic

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """See `contract.Sink.publish`; order is kept per key, and only there."""
        requests = self._requests
        if requests is None:
            return [NotSent("the sink is not open")] * len(events)
        with requests.call(len(events)) as call:
            for index, event in enumerate(events):
                try:
                    key, message = self._encoder.encode(event)
                except Unsendable as refused:
                    call.settle(index, refused.outcome)
                else:
                    requests.put(key, message, call, index)
            requests.start()
            await call.done
            return cast("list[Outcome]", call.outcomes)

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """See `contract.Sink.topology`."""
        connection = await connect(self._settings)
        try:
            return [await resources.topic_declaration(connection, self._topic, self._settings.retention, apply=apply)]
        except PrivilegeError:
            # Who may only publish cannot look, and need not.
            if apply or await permissions.lacking(connection, self._needs):
                raise
            return [resources.unseen("topic", self._topic)]
        finally:
            await connection.close()

    async def inspect(self, topics: Sequence[str]) -> Sequence[str]:
        """See `contract.InspectableSink.inspect`. The service has one permission for all events of a topic."""
        connection = await connect(self._settings)
        try:
            await self._found_topic(connection)
            return await permissions.require(connection, self._needs)
        finally:
            await connection.close()

    async def close(self) -> None:
        """See `contract.Sink.close`."""
        requests, self._requests = self._requests, None
        watching, self._watching = self._watching, []
        for task in watching:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if requests is not None:
            await requests.close()


async def _watch(connection: Connection, requests: Requests) -> None:
    """Notices that the service cannot be reached, when no request is in flight that would fail.

    A connection that the service ends in order, as it does now and then, gRPC makes anew by itself.
    """
    state = connection.channel.get_state(try_to_connect=True)
    while state not in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
        await connection.channel.wait_for_state_change(state)
        state = connection.channel.get_state(try_to_connect=True)
    requests.give_up(f"Pub/Sub at {connection.address} cannot be reached")
