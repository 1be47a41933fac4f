"""Accounts on RabbitMQ and NATS that may do what one kind of process needs and no more, as docs/operations.md says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.support.servers import NatsServer, RabbitMQServer

PASSWORD: Final = "hunter2"

WORKER: Final = "invoices"
"""The worker that they are for; the exchange, or stream, is `events`."""


@dataclass(frozen=True)
class Rights:
    """Of a user of RabbitMQ: regular expressions of the names of exchanges and queues."""

    configure: str = "^$"
    write: str = "^$"
    read: str = "^$"


BRIDGE: Final = Rights(write="^events$")
WORKERS: Final = Rights(write=r"^amq\.default$", read=f"^{WORKER}.*")
TOPOLOGY: Final = Rights(
    configure=f"^(events|{WORKER}.*)$", write=rf"^(amq\.default|{WORKER}.*)$", read=f"^(events|{WORKER}.*)$"
)


def add_users(
    server: RabbitMQServer, virtual_host: str, users: Mapping[str, Rights], topics: Mapping[str, str] | None = None
) -> None:
    """Adds a virtual host, and users of it, in one call, since each of rabbitmqctl takes a second. `topics`: what users
    may publish to the exchange, where that is not all."""
    calls = [f'rabbit_vhost:add(<<"{virtual_host}">>, <<"test">>)']
    for user, rights in users.items():
        allowed = ", ".join(f"<<{json.dumps(each)}>>" for each in (rights.configure, rights.write, rights.read))
        calls += [
            f'rabbit_auth_backend_internal:add_user(<<"{user}">>, <<"{PASSWORD}">>, <<"test">>)',
            f'rabbit_auth_backend_internal:set_permissions(<<"{user}">>, <<"{virtual_host}">>, {allowed}, <<"test">>)',
        ]
    for user, write in (topics or {}).items():
        calls.append(
            f'rabbit_auth_backend_internal:set_topic_permissions(<<"{user}">>, <<"{virtual_host}">>, <<"events">>, '
            f'<<{json.dumps(write)}>>, <<"">>, <<"test">>)'
        )
    server.ctl("eval", ", ".join(calls) + ".")


DEAD: Final = Rights(write=r"^amq\.default$", read=rf"^{WORKER}\.dead$")
"""`pgbridge dead`; writing is for `replay`."""

INBOX: Final = "_INBOX.>"
"""What everybody subscribes to."""

ASKS: Final = "$SYS.REQ.USER.INFO"
"""What `check` publishes beside what the process itself does."""

NATS_BRIDGE: Final = ("$JS.API.STREAM.INFO.events", "events.>")
NATS_FAST: Final = ("$JS.API.INFO",)
"""What the bridge needs besides, to have several events of a key on the way."""

NATS_WORKERS: Final = (
    "$JS.API.STREAM.INFO.events",
    f"$JS.API.STREAM.INFO.{WORKER}_dead",
    f"$JS.API.CONSUMER.INFO.events.{WORKER}",
    f"$JS.API.CONSUMER.MSG.NEXT.events.{WORKER}",
    f"$JS.ACK.events.{WORKER}.>",
    f"{WORKER}_dead.>",
)
NATS_ORDERED: Final = (f"$JS.API.CONSUMER.UNPIN.events.{WORKER}",)
"""What an ordered worker needs besides, to hand over at once."""

NATS_LOOKS: Final = (
    "$JS.API.STREAM.INFO.events",
    f"$JS.API.STREAM.INFO.{WORKER}_dead",
    f"$JS.API.CONSUMER.INFO.events.{WORKER}",
)
"""`pgbridge topology`."""

NATS_APPLIES: Final = (
    *NATS_LOOKS,
    "$JS.API.STREAM.CREATE.events",
    f"$JS.API.STREAM.CREATE.{WORKER}_dead",
    f"$JS.API.CONSUMER.DURABLE.CREATE.events.{WORKER}",
)
NATS_DEAD: Final = (
    f"$JS.API.STREAM.INFO.{WORKER}_dead",
    f"$JS.API.CONSUMER.CREATE.{WORKER}_dead",
    f"$JS.API.CONSUMER.MSG.NEXT.{WORKER}_dead.*",
    f"$JS.API.CONSUMER.DELETE.{WORKER}_dead.*",
)
"""`pgbridge dead list` and `show`."""

NATS_REPLAYS: Final = (*NATS_DEAD, f"$JS.API.STREAM.MSG.DELETE.{WORKER}_dead", "events.>")
"""`pgbridge dead replay` and `discard`."""


def nats_users(users: Mapping[str, Sequence[str]]) -> str:
    """The line of nats.conf that gives each user what it may publish to."""
    written = [
        f'{{ user: "{user}", password: "{PASSWORD}", permissions: {{ '
        f"publish: {json.dumps(list(subjects))}, subscribe: {json.dumps([INBOX])} }} }}"
        for user, subjects in users.items()
    ]
    everything = f'{{ user: "admin", password: "{PASSWORD}" }}'
    return f"authorization {{ users: [ {', '.join([everything, *written])} ] }}"


def url_of(server: RabbitMQServer | NatsServer, user: str, virtual_host: str = "") -> str:
    """The URL of a server for one of these users."""
    scheme = "nats" if isinstance(server, NatsServer) else "amqp"
    return f"{scheme}://{user}:{PASSWORD}@127.0.0.1:{server.port}" + (f"/{virtual_host}" if scheme == "amqp" else "")
