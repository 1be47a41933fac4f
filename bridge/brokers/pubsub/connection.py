"""A connection to Pub/Sub: one gRPC channel with its credentials, and the methods that are called on it.

The methods take and give raw protobuf messages, since the client library's own wrappers cost several times the CPU.
"""

import asyncio
import json
from typing import Any, Final

import google.auth
import grpc
from google.api_core import grpc_helpers_async
from google.auth import aws, identity_pool
from google.auth.exceptions import GoogleAuthError
from google.iam.v1 import iam_policy_pb2
from google.oauth2 import service_account
from google.protobuf import empty_pb2
from google.pubsub_v1 import types

from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.errors import (
    BrokerUnavailableError,
    PgbridgeError,
    PrivilegeError,
    SettingsError,
    TopologyError,
)

CALL_LIMIT: Final = 30.0
"""Seconds that one call may take, publishing and pulling aside."""

SCOPES: Final = ("https://www.googleapis.com/auth/pubsub",)

AWS_TOKEN: Final = "urn:ietf:params:aws:token-type:aws4_request"  # noqa: S105 - the name of a kind

_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Each connection is made anew and at once; the relay and the worker's runtime space their attempts themselves.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 5000),
    # What was sent twice would be out of order; only the relay may send again.
    ("grpc.enable_retries", 0),
)
_KEEPALIVE: Final = (("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000))
"""As often as Google's own client asks. The emulator ends connections that are asked as often."""


class Connection:
    """One channel. `address` is shown in errors."""

    def __init__(self, channel: grpc.aio.Channel, address: str, *, emulated: bool) -> None:
        self.channel = channel
        self.address = address
        self.emulated = emulated
        publisher, subscriber = "google.pubsub.v1.Publisher", "google.pubsub.v1.Subscriber"
        empty = empty_pb2.Empty
        self.publish = self._method(publisher, "Publish", types.PublishRequest.pb(), types.PublishResponse.pb())
        # Takes an encoded request (`encode.py`) and gives the response's bytes, which nobody needs.
        self.publish_encoded = channel.unary_unary(f"/{publisher}/Publish")
        self.get_topic = self._method(publisher, "GetTopic", types.GetTopicRequest.pb(), types.Topic.pb())
        self.create_topic = self._method(publisher, "CreateTopic", types.Topic.pb(), types.Topic.pb())
        self.update_topic = self._method(publisher, "UpdateTopic", types.UpdateTopicRequest.pb(), types.Topic.pb())
        self.list_topic_subscriptions = self._method(
            publisher,
            "ListTopicSubscriptions",
            types.ListTopicSubscriptionsRequest.pb(),
            types.ListTopicSubscriptionsResponse.pb(),
        )
        subscription = types.Subscription.pb()
        self.get_subscription = self._method(
            subscriber, "GetSubscription", types.GetSubscriptionRequest.pb(), subscription
        )
        self.create_subscription = self._method(subscriber, "CreateSubscription", subscription, subscription)
        self.update_subscription = self._method(
            subscriber, "UpdateSubscription", types.UpdateSubscriptionRequest.pb(), subscription
        )
        self.pull = self._method(subscriber, "Pull", types.PullRequest.pb(), types.PullResponse.pb())
        self.acknowledge = self._method(subscriber, "Acknowledge", types.AcknowledgeRequest.pb(), empty)
        self.modify_ack_deadline = self._method(
            subscriber, "ModifyAckDeadline", types.ModifyAckDeadlineRequest.pb(), empty
        )
        self.test_iam_permissions = self._method(
            "google.iam.v1.IAMPolicy",
            "TestIamPermissions",
            iam_policy_pb2.TestIamPermissionsRequest,
            iam_policy_pb2.TestIamPermissionsResponse,
        )

    def _method(self, service: str, name: str, request: Any, response: Any) -> Any:
        return self.channel.unary_unary(
            f"/{service}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

    async def call(self, method: Any, request: Any, *, limit: float = CALL_LIMIT) -> Any:
        """One call within `limit` seconds; errors as `explained`."""
        try:
            return await method(request, timeout=limit)
        except grpc.aio.AioRpcError as error:
            raise explained(error, self.address) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise BrokerUnavailableError(f"the connection to Pub/Sub at {self.address} was closed") from None

    async def allowed(self, resource: str, permissions: list[str]) -> set[str]:
        """Which of these permissions these credentials have on a topic or subscription; on the emulator all."""
        if self.emulated:
            return set(permissions)
        request = iam_policy_pb2.TestIamPermissionsRequest(resource=resource, permissions=permissions)
        return set((await self.call(self.test_iam_permissions, request)).permissions)

    async def close(self) -> None:
        """Ends it; calls in flight are cancelled."""
        await self.channel.close()


async def connect(settings: PubSubSettings) -> Connection:
    """A connection that has not been used yet, so the server need not answer.

    Raises SettingsError when there are no usable credentials.
    """
    if settings.emulator_host:
        channel = grpc.aio.insecure_channel(settings.emulator_host, options=_OPTIONS)
        return Connection(channel, settings.emulator_host, emulated=True)
    # Reads files, and may ask the metadata server of the machine.
    credentials = await asyncio.to_thread(_credentials, settings)
    channel = grpc_helpers_async.create_channel(
        settings.endpoint, credentials=credentials, options=[*_OPTIONS, *_KEEPALIVE]
    )
    return Connection(channel, settings.endpoint, emulated=False)


def _credentials(settings: PubSubSettings) -> Any:
    given = settings.credentials.get_secret_value()
    if given:
        return _given_credentials(given)
    try:
        credentials, _ = google.auth.default(scopes=SCOPES)
    except GoogleAuthError as error:
        raise SettingsError(
            f"no credentials for Pub/Sub: {str(error).rstrip('. ')}. Set credentials_file to a service account key or "
            "a workload identity configuration, or provide application default credentials; see docs/pubsub.md"
        ) from None
    return credentials


def _given_credentials(given: str) -> Any:
    """Credentials of the kind that the JSON names. Errors do not repeat it: it may hold a private key."""
    try:
        parsed = json.loads(given)
        kind = parsed["type"]
    except (ValueError, TypeError, KeyError):
        raise SettingsError(
            'the credentials for Pub/Sub are no JSON object with a "type"; give the file that Google issued, unchanged'
        ) from None
    load: Any
    if kind == "service_account":
        load = service_account.Credentials.from_service_account_info
    elif kind == "external_account" and parsed.get("subject_token_type") == AWS_TOKEN:
        load = aws.Credentials.from_info
    elif kind == "external_account":
        load = identity_pool.Credentials.from_info
    else:
        raise SettingsError(
            "the credentials for Pub/Sub are of a type that is neither service_account nor external_account; "
            "leave them out to use application default credentials"
        )
    try:
        return load(parsed, scopes=SCOPES)
    except (GoogleAuthError, ValueError, TypeError):
        raise SettingsError(f"Google's library cannot use the credentials for Pub/Sub as {kind}") from None


def said_by(error: grpc.aio.AioRpcError) -> str:
    """A gRPC error in one sentence."""
    details = " ".join(str(error.details() or "no details").split())
    return f"{error.code().name}: {details[:500]}"


def explained(error: grpc.aio.AioRpcError, address: str) -> PgbridgeError:
    """A gRPC error as one of ours: something is missing, forbidden, refused, or the service does not answer."""
    code = grpc.StatusCode
    said = f"Pub/Sub at {address} says {said_by(error)}"
    match error.code():
        case code.PERMISSION_DENIED | code.UNAUTHENTICATED:
            return PrivilegeError(f"{said}. docs/pubsub.md lists the roles that each process needs")
        case code.NOT_FOUND:
            return TopologyError(f"{said}. Run `pgbridge topology --apply`")
        case code.INVALID_ARGUMENT | code.ALREADY_EXISTS | code.FAILED_PRECONDITION | code.UNIMPLEMENTED:
            return TopologyError(said)
        case _:
            return BrokerUnavailableError(f"Pub/Sub at {address} does not answer: {said_by(error)}")
