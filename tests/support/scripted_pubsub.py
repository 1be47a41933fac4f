"""A Pub/Sub server that answers as a test says: for refusals and limits that the emulator does not know."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
from google.iam.v1 import iam_policy_pb2
from google.protobuf import empty_pb2
from google.pubsub_v1 import types

from tests.support.servers import free_port
from tests.support.until import until

Answer = Callable[[Sequence[Any]], Awaitable[grpc.StatusCode | None]]
"""From the messages of a publish request to the code that refuses it; None confirms."""


async def confirm(messages: Sequence[Any]) -> grpc.StatusCode | None:
    """The answer of a service that is well."""
    return None


class ScriptedPubSub:
    """Takes publish requests for any topic, and keeps what it confirmed.

    Every topic and subscription exists, unless `refusals` says otherwise; one that was created is as it was created.
    """

    def __init__(self, answer: Answer = confirm, *, certificate: tuple[Path, Path] | None = None) -> None:
        """With a `certificate` and its key, it speaks TLS."""
        self.answer = answer
        self.refusals: dict[str, grpc.StatusCode] = {}
        """By the name of a method, as ``GetTopic``: the code with which it is refused."""
        self.gates: dict[str, asyncio.Event] = {}
        """By the name of a method: it answers once this is set."""
        self.grants: Collection[tuple[str, str]] | None = None
        """Pairs of the short name of a topic or subscription and a permission that is granted on it; None: all."""
        self._created: dict[str, Any] = {}
        """Topics and subscriptions by full name."""
        self.calls: list[str] = []
        """The names of the methods that were called, publishing aside."""
        self._certificate = certificate
        self.address = f"127.0.0.1:{free_port()}"
        self.requests: list[Sequence[Any]] = []
        """Messages of each request, in the order of arrival."""
        self.confirmed: list[Any] = []
        self.to_pull: list[Any] = []
        """Messages that the next pulls give."""
        self.pulled: dict[str, Any] = {}
        """By ack id: the messages that pulls gave."""
        self.acknowledged: list[str] = []
        """Ack ids, as they were acknowledged."""
        self.leases: list[tuple[str, int]] = []
        """Ack ids and the seconds that their leases were given, as that was done."""
        self.most_at_once: dict[str, int] = {}
        """By ordering key: most requests that were in flight together."""
        self._at_once: dict[str, int] = {}
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])

    async def __aenter__(self) -> Self:
        topic, subscription, empty = types.Topic.pb(), types.Subscription.pb(), empty_pb2.Empty
        services = {
            "google.pubsub.v1.Publisher": {
                "GetTopic": self._handler("GetTopic", types.GetTopicRequest.pb(), topic, self._topic),
                "CreateTopic": self._handler("CreateTopic", topic, topic, self._create),
                "Publish": _handler(self._publish, types.PublishRequest.pb(), types.PublishResponse.pb()),
            },
            "google.pubsub.v1.Subscriber": {
                "GetSubscription": self._handler(
                    "GetSubscription", types.GetSubscriptionRequest.pb(), subscription, self._subscription
                ),
                "CreateSubscription": self._handler("CreateSubscription", subscription, subscription, self._create),
                "Pull": self._handler("Pull", types.PullRequest.pb(), types.PullResponse.pb(), self._pull),
                "Acknowledge": self._handler("Acknowledge", types.AcknowledgeRequest.pb(), empty, self._acknowledge),
                "ModifyAckDeadline": self._handler(
                    "ModifyAckDeadline", types.ModifyAckDeadlineRequest.pb(), empty, self._modify
                ),
            },
            "google.iam.v1.IAMPolicy": {
                "TestIamPermissions": self._handler(
                    "TestIamPermissions",
                    iam_policy_pb2.TestIamPermissionsRequest,
                    iam_policy_pb2.TestIamPermissionsResponse,
                    self._permissions,
                ),
            },
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items()]
        )
        if self._certificate is None:
            self._server.add_insecure_port(self.address)
        else:
            certificate, key = (path.read_bytes() for path in self._certificate)
            self._server.add_secure_port(self.address, grpc.ssl_server_credentials([(key, certificate)]))
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(grace=None)

    def _handler(self, name: str, request: Any, response: Any, answer: Callable[[Any], Any]) -> Any:
        async def method(asked: Any, context: Any) -> Any:
            self.calls.append(name)
            if (gate := self.gates.get(name)) is not None:
                await gate.wait()
            if (code := self.refusals.get(name)) is not None:
                await context.abort(code, "as the test says")
            return answer(asked)

        return _handler(method, request, response)

    def _permissions(self, request: Any) -> Any:
        short = request.resource.rpartition("/")[2]
        granted = [each for each in request.permissions if self.grants is None or (short, each) in self.grants]
        return iam_policy_pb2.TestIamPermissionsResponse(permissions=granted)

    def _create(self, wanted: Any) -> Any:
        self._created[wanted.name] = wanted
        return wanted

    def _topic(self, request: Any) -> Any:
        topic = types.Topic.pb()(name=request.topic)
        topic.message_retention_duration.seconds = 86400
        return self._created.get(request.topic, topic)

    def _subscription(self, request: Any) -> Any:
        """Of the topic ``events`` in the same project, where it was not created."""
        name, project = request.subscription, request.subscription.partition("/subscriptions/")[0]
        subscription = types.Subscription.pb()(name=name, topic=f"{project}/topics/events", ack_deadline_seconds=10)
        return self._created.get(name, subscription)

    def _pull(self, request: Any) -> Any:
        messages, self.to_pull = self.to_pull[: request.max_messages], self.to_pull[request.max_messages :]
        given = {str(number): message for number, message in enumerate(messages, start=len(self.pulled))}
        self.pulled |= given
        received = [types.ReceivedMessage.pb()(ack_id=ack_id, message=message) for ack_id, message in given.items()]
        return types.PullResponse.pb()(received_messages=received)

    def _acknowledge(self, request: Any) -> Any:
        self.acknowledged += request.ack_ids
        return empty_pb2.Empty()

    def _modify(self, request: Any) -> Any:
        self.leases += [(ack_id, request.ack_deadline_seconds) for ack_id in request.ack_ids]
        return empty_pb2.Empty()

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
        """Waits until so many requests have come."""
        await until(lambda: len(self.requests) >= count, f"{count} requests have come")


def _handler(method: Any, request: Any, response: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )
