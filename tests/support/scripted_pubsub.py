"""A Pub/Sub server that answers as a test says: for refusals and limits that the emulator does not know."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

import grpc
from google.pubsub_v1 import types

from bridge.demo.servers import free_port

Answer = Callable[[Sequence[Any]], Awaitable[grpc.StatusCode | None]]
"""From the messages of a publish request to the code that refuses it; None confirms."""


async def confirm(messages: Sequence[Any]) -> grpc.StatusCode | None:
    """The answer of a service that is well."""
    return None


class ScriptedPubSub:
    """Takes publish requests for any topic, and keeps what it confirmed."""

    def __init__(self, answer: Answer = confirm) -> None:
        self.answer = answer
        self.address = f"127.0.0.1:{free_port()}"
        self.requests: list[Sequence[Any]] = []
        """Messages of each request, in the order of arrival."""
        self.confirmed: list[Any] = []
        self.most_at_once: dict[str, int] = {}
        """By ordering key: most requests that were in flight together."""
        self._at_once: dict[str, int] = {}
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])

    async def __aenter__(self) -> Self:
        handlers = {
            "GetTopic": _handler(self._get_topic, types.GetTopicRequest, types.Topic),
            "Publish": _handler(self._publish, types.PublishRequest, types.PublishResponse),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("google.pubsub.v1.Publisher", handlers),)
        )
        self._server.add_insecure_port(self.address)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(grace=None)

    async def _get_topic(self, request: Any, context: Any) -> Any:
        topic = types.Topic.pb()(name=request.topic)
        topic.message_retention_duration.seconds = 86400
        return topic

    async def _publish(self, request: Any, context: Any) -> Any:
        messages = list(request.messages)
        self.requests.append(messages)
        keys = {message.ordering_key for message in messages}
        for key in keys:
            self._at_once[key] = self._at_once.get(key, 0) + 1
            self.most_at_once[key] = max(self.most_at_once.get(key, 0), self._at_once[key])
        try:
            code = await self.answer(messages)
        finally:
            for key in keys:
                self._at_once[key] -= 1
        if code is not None:
            await context.abort(code, "as the test says")
        self.confirmed += messages
        return types.PublishResponse.pb()(message_ids=[str(n) for n in range(len(messages))])

    async def requests_reach(self, count: int) -> None:
        """Waits until so many requests have come; fails after 10 s."""
        async with asyncio.timeout(10):
            while len(self.requests) < count:
                await asyncio.sleep(0.01)


def _handler(method: Any, request: Any, response: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method,
        request_deserializer=request.pb().FromString,
        response_serializer=response.pb().SerializeToString,
    )
