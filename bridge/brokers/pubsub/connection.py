"""A connection to Pub/Sub: one gRPC channel with its credentials, the methods that are called on it, and what each
error of Pub/Sub means.

`connect` exchanges the credentials for a token at once, since gRPC would hide in one code why that fails.
Methods take and give raw protobuf messages, since the client library's own wrappers cost several times as much.
"""

import asyncio
import contextlib
import json
import ssl
from functools import partial
from typing import Any, Final

import google.auth
import grpc
from google.api_core import grpc_helpers_async
from google.auth import aws, identity_pool
from google.auth.exceptions import GoogleAuthError, TransportError
from google.auth.transport.requests import Request
from google.iam.v1 import iam_policy_pb2
from google.oauth2 import service_account
from google.protobuf import empty_pb2
from google.pubsub_v1 import types

from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.errors import (
    BrokerUnavailableError,
    LoginError,
    PgbridgeError,
    PrivilegeError,
    RefusedError,
    SettingsError,
    TopologyError,
)
from bridge.process.tasks import is_cancelled

CALL_LIMIT: Final = 30.0
"""Seconds that one call may take, publishing and pulling aside."""

TOKEN_LIMIT: Final = 20.0
"""Seconds that one request for a token may take."""

PROBE_LIMIT: Final = 5.0
"""Seconds in which an endpoint must show its certificate, when it is looked into why gRPC cannot connect."""

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


class MissingError(TopologyError):
    """The service knows no topic, subscription or project of this name."""


class TimedOutError(BrokerUnavailableError):
    """The service did not answer within a call's limit."""


class Connection:
    """One channel, made by `connect`."""

    def __init__(self, channel: grpc.aio.Channel, settings: PubSubSettings) -> None:
        self.channel = channel
        self.address = settings.address
        self.emulated = bool(settings.emulator_host)
        self._settings = settings
        publisher, subscriber = "google.pubsub.v1.Publisher", "google.pubsub.v1.Subscriber"
        empty = empty_pb2.Empty
        self.publish = self._method(publisher, "Publish", types.PublishRequest.pb(), types.PublishResponse.pb())
        # Takes an encoded request (see `message.Encoder`) and gives the response's bytes, which nobody needs.
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

    async def call(self, method: Any, request: Any, *, limit: float = CALL_LIMIT, reconnect: bool = False) -> Any:
        """One call within `limit` seconds. Raises what `explained` makes of an error.

        With `reconnect`, one whose connection was lost is made anew within this time, instead of failing at once.
        """
        try:
            return await method(request, timeout=limit, wait_for_ready=reconnect)
        except grpc.aio.AioRpcError as error:
            raise await self.explained(error) from error
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise self._left() from None
        except grpc.aio.UsageError:
            raise self._left() from None

    def _left(self) -> BrokerUnavailableError:
        return BrokerUnavailableError(f"{self.at()} was left: this process closed the connection")

    async def allowed(self, resource: str, permission: str) -> bool:
        """Whether these credentials have a permission on a topic or subscription; on the emulator all."""
        if self.emulated:
            return True
        request = iam_policy_pb2.TestIamPermissionsRequest(resource=resource, permissions=[permission])
        return permission in (await self.call(self.test_iam_permissions, request)).permissions

    def at(self, field: str | None = None) -> str:
        """Begins an error: the key of this setting, by default of the address, and where the service is."""
        key = self._settings.address_key if field is None else self._settings.key(field)
        return f"{key}: Pub/Sub at {self.address}"

    async def explained(self, error: grpc.aio.AioRpcError) -> PgbridgeError:
        """What an error of a call means for whoever runs pgbridge."""
        code = grpc.StatusCode
        said = said_by(error)
        match error.code():
            case code.UNAUTHENTICATED:
                return LoginError(f"{self.at('credentials')} does not take the credentials: {said}")
            case code.PERMISSION_DENIED:
                return PrivilegeError(
                    f"{self.at('credentials')} does not permit this: {said}. docs/pubsub.md lists the roles that each "
                    "process needs"
                )
            case code.NOT_FOUND:
                return MissingError(f"{self.at()} says {said}. Run `pgbridge topology --apply`")
            case code.ALREADY_EXISTS | code.FAILED_PRECONDITION:
                return TopologyError(f"{self.at()} says {said}")
            case code.INVALID_ARGUMENT | code.OUT_OF_RANGE | code.UNIMPLEMENTED:
                return RefusedError(f"{self.at()} refuses: {said}")
            case code.DEADLINE_EXCEEDED:
                return TimedOutError(f"{self.at()} does not answer in time: {said}")
            case code.UNAVAILABLE if self.channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                problem = None if self.emulated else await _problem_with_tls(self.address)
                if problem is not None:
                    return RefusedError(f"{self.at()} {problem}")
                return BrokerUnavailableError(f"{self.at()} does not answer: {said}")
            case _:
                return BrokerUnavailableError(f"{self.at()} is not available now: {said}")

    async def close(self) -> None:
        """Ends it; calls in flight are cancelled."""
        await self.channel.close()


async def connect(settings: PubSubSettings) -> Connection:
    """A connection with a token, but without a call yet: the service need not answer.

    Raises SettingsError when there are no usable credentials, LoginError when they are refused, and
    BrokerUnavailableError when the server that gives tokens for them does not answer.
    """
    if settings.emulator_host:
        return Connection(grpc.aio.insecure_channel(settings.emulator_host, options=_OPTIONS), settings)
    # Reads files, and asks Google, or the metadata server of the machine.
    credentials = await asyncio.to_thread(_credentials, settings)
    channel = grpc_helpers_async.create_channel(
        settings.endpoint, credentials=credentials, options=[*_OPTIONS, *_KEEPALIVE]
    )
    return Connection(channel, settings)


def _credentials(settings: PubSubSettings) -> Any:
    """Credentials that hold a token."""
    key = settings.key("credentials")
    given = settings.credentials.get_secret_value()
    credentials = _given_credentials(given, key) if given else _default_credentials(key)
    try:
        credentials.refresh(partial(Request(), timeout=TOKEN_LIMIT))
    except TransportError as error:
        raise BrokerUnavailableError(f"{key}: the server that gives tokens for them does not answer: {error}") from None
    except GoogleAuthError as error:
        reason = str(error.args[0] if error.args else error)
        if error.retryable:
            raise BrokerUnavailableError(f"{key}: the server that gives tokens is not available: {reason}") from None
        raise LoginError(f"{key}: they are refused, so there is no token for Pub/Sub: {reason}") from None
    return credentials


def _default_credentials(key: str) -> Any:
    try:
        credentials, _ = google.auth.default(scopes=SCOPES)
    except GoogleAuthError as error:
        raise SettingsError(
            f"{key}: there are none for Pub/Sub: {str(error).rstrip('. ')}. Set credentials_file to a service account "
            "key or a workload identity configuration, or provide application default credentials; see docs/pubsub.md"
        ) from None
    return credentials


def _given_credentials(given: str, key: str) -> Any:
    """Credentials of the kind that the JSON names. Errors do not repeat it: it may hold a private key."""
    try:
        parsed = json.loads(given)
        kind = parsed["type"]
    except (ValueError, TypeError, KeyError):
        raise SettingsError(
            f'{key}: are not a JSON object with a "type"; give the file that Google issued, unchanged'
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
            f"{key}: are of a type that is neither service_account nor external_account; leave them out to use "
            "application default credentials"
        )
    try:
        return load(parsed, scopes=SCOPES)
    except (GoogleAuthError, ValueError, TypeError):
        raise SettingsError(f"{key}: Google's library cannot use them as {kind}") from None


async def _problem_with_tls(address: str) -> str | None:
    """Why an endpoint that takes connections makes none with TLS; None when that is not the reason.

    gRPC has one code for this and for an endpoint that does not answer.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_LIMIT):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=ssl.create_default_context())
    except ssl.SSLCertVerificationError as error:
        return f"shows a certificate that is not trusted, or not for this host: {error.verify_message}"
    except ssl.SSLError as error:
        return f"makes no TLS connection: {error.reason or error}"
    except (OSError, TimeoutError):
        return None
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return None


def said_by(error: grpc.aio.AioRpcError) -> str:
    """A gRPC error in one sentence."""
    details = " ".join(str(error.details() or "no details").split())
    return f"{error.code().name}: {details[:500]}"
