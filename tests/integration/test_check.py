"""`pgbridge check`: each thing that can be broken before a start is broken here, and must be named.

docs/check.md shows what is said. `UPDATE_PAGES=1 pytest tests/integration/test_check.py` writes it anew.
"""

import asyncio
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aio_pika
import nats
import psycopg
import pytest
from click.testing import CliRunner

from bridge.brokers.registry import broker_of
from bridge.commands import check_database
from bridge.commands.check import BOTH, Finding, check, findings
from bridge.commands.check_brokers import subscriptions
from bridge.commands.check_database import NAME
from bridge.commands.check_settings import of_ports
from bridge.postgres.schema import migrate
from bridge.process.health import Health, serving
from bridge.settings import Process, Settings, load
from tests.support.environment import ROOT
from tests.support.narrow import (
    ASKS,
    BRIDGE,
    NATS_BRIDGE,
    NATS_WORKERS,
    PASSWORD,
    WORKERS,
    Rights,
    add_users,
    nats_users,
    url_of,
)
from tests.support.servers import NatsServer, PostgresServer, RabbitMQServer, free_port
from tests.support.shop import SHOP

pytestmark = pytest.mark.rabbitmq

HOST: Final = "check"
"""The virtual host of RabbitMQ."""

USERS: Final[Mapping[str, Rights]] = {
    "bridge": BRIDGE,
    "workers": WORKERS,
    "both": Rights(write=r"^(events|amq\.default)$", read="^invoices.*"),
    "nobody": Rights(),
    "reader": Rights(read="^invoices.*"),
    "narrow": Rights(write=r"^(events|amq\.default)$", read="^invoices.*"),
}
"""On RabbitMQ; the topics of `narrow` are limited to those below shop.order."""

NATS_USERS: Final[Mapping[str, Sequence[str]]] = {
    "bridge": (*NATS_BRIDGE, ASKS),
    "workers": (*NATS_WORKERS, ASKS),
    "both": (*NATS_BRIDGE, *NATS_WORKERS, ASKS),
    "unasked": (*NATS_BRIDGE, *NATS_WORKERS),
    "mute": ("$JS.API.STREAM.INFO.events", *NATS_WORKERS, ASKS),
    "part": ("$JS.API.STREAM.INFO.events", "events.shop.order.>", *NATS_WORKERS, ASKS),
    "no-ack": (*NATS_BRIDGE, *(each for each in NATS_WORKERS if "ACK" not in each), ASKS),
    "no-letters": (*NATS_BRIDGE, *(each for each in NATS_WORKERS if not each.startswith("invoices_dead")), ASKS),
}

SETTINGS: Final = """\
name = "shop"
[postgres]
dsn = "{bridge}"
[sinks.events]
{sink}
[[routes]]
topic = "shop.#"
sink = "events"
[workers]
dsn = "{worker}"
[workers.invoices]
handler = "tests.support.worker_handlers:echo"
reply = "shop.rendered"
"""


@dataclass
class World:
    """Servers on which nothing is broken."""

    postgres: PostgresServer
    rabbitmq: RabbitMQServer
    nats: NatsServer
    folder: Path
    """Where settings are."""

    def sink(self, user: str, *, on: str = "rabbitmq") -> str:
        """The table of a sink."""
        if on == "nats":
            return f'type = "nats"\nurl = "{url_of(self.nats, user)}"'
        return f'type = "rabbitmq"\nurl = "{url_of(self.rabbitmq, user, HOST)}"'

    def settings(
        self, user: str, *, on: str, change: Mapping[str, str], mode: int = 0o600, text: str = SETTINGS
    ) -> Path:
        """The file of settings in which an account is used on a broker, with something replaced."""
        text = text.format(
            bridge=self.postgres.dsn("shop", "shop_bridge"),
            worker=self.postgres.dsn("shop", "shop_workers"),
            sink=self.sink(user, on=on),
        )
        for old, new in change.items():
            assert old in text, f"{old!r} is not in the settings"
            text = text.replace(old, new)
        path = self.folder / "bridge.toml"
        path.write_text(text)
        path.chmod(mode)
        return path

    def admin(self, *statements: str) -> None:
        """Runs SQL as the superuser."""
        with psycopg.connect(self.postgres.dsn("shop"), autocommit=True, application_name=NAME) as connection:
            for statement in filter(None, statements):
                connection.execute(statement.encode())

    def told(self, text: str) -> str:
        """What was said, with the usual ports and folders in the place of these servers'."""
        for port, usual in ((self.postgres.port, 5432), (self.rabbitmq.port, 5672), (self.nats.port, 4222)):
            text = text.replace(f"port {port}", f"port {usual}").replace(f"127.0.0.1:{port}", f"127.0.0.1:{usual}")
        return text.replace(str(self.folder), "/etc/pgbridge")


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQServer, server_folder: Path) -> Iterator[World]:
    folder = server_folder / "check"
    folder.mkdir()
    admin = {"admin": Rights(".*", ".*", ".*")}
    add_users(rabbitmq, HOST, {**USERS, **admin}, topics={"narrow": r"^shop\.order\."})
    # Durable, unlike other tests' servers, since durability is looked at.
    with (
        PostgresServer(folder, settings={"max_connections": "60"}) as postgres,
        NatsServer(folder, lines=[nats_users(NATS_USERS)]) as nats,
    ):
        migrate(postgres.create_database("shop"))
        postgres.create_database("empty")
        made = World(postgres, rabbitmq, nats, folder)
        made.admin(
            SHOP,
            "create role shop_bridge login in role bridge_relay",
            "create role shop_workers login in role bridge_worker",
            "select bridge.emit('shop.order.placed', '1'::jsonb)",
        )
        for on in ("rabbitmq", "nats"):
            asyncio.run(declare(load(made.settings("admin", on=on, change={}), environ={})))
        asyncio.run(add_stream(nats, "elsewhere", "other.>"))
        yield made


async def declare(settings: Settings) -> None:
    """As `pgbridge topology --apply`."""
    sink = settings.sinks["events"]
    await broker_of(sink).sink(sink).topology(apply=True)
    for _, subscription in subscriptions(settings).values():
        await broker_of(sink).queue(sink, subscription).topology(apply=True)


async def add_stream(server: NatsServer, name: str, subject: str) -> None:
    connection = await nats.connect(url_of(server, "admin"))
    await connection.jetstream().add_stream(name=name, subjects=[subject])
    await connection.close()


def _first_lines(out: str) -> list[str]:
    """Of each finding."""
    return [line for line in out.splitlines() if not line.startswith(" ")]


async def printed(*arguments: str, expect: int = 0) -> str:
    """What `pgbridge check` prints where there is no terminal."""
    done = await asyncio.to_thread(CliRunner().invoke, check, arguments)
    assert done.exit_code == expect, done.output
    return done.output


async def found_in(path: Path, processes: Sequence[Process] = BOTH) -> list[Finding]:
    settings = load(path, environ={})
    return [finding async for finding in findings(settings, processes=processes, config=path)]


def wrong_of(found: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.warning or not finding.ok]


Around = Callable[[World], AbstractContextManager[Mapping[str, str]]]
"""Breaks something for a while; gives what is to be replaced in the settings."""


@contextmanager
def unbroken(world: World) -> Iterator[Mapping[str, str]]:
    yield {}


@contextmanager
def taken_port(world: World) -> Iterator[Mapping[str, str]]:
    with served_by("another") as address:
        yield listens(address)


@contextmanager
def served_by(name: str) -> Iterator[str]:
    """The address of a process that calls itself so."""
    address = f"127.0.0.1:{free_port()}"
    with serving("observe.listen", address, lambda: Health(name, "leading")):
        yield address


@contextmanager
def deaf_port(world: World) -> Iterator[Mapping[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield {HANDLER: f'{HANDLER}\nlisten = "127.0.0.1:{taken.getsockname()[1]}"'}


@contextmanager
def secret_file(world: World) -> Iterator[Mapping[str, str]]:
    secret = world.folder / "url"
    secret.write_text(url_of(world.rabbitmq, "both", HOST))
    secret.chmod(0o644)
    yield {f'url = "{secret.read_text()}"': f'url_file = "{secret}"'}
    secret.unlink()


@contextmanager
def credential(world: World) -> Iterator[Mapping[str, str]]:
    folder = world.folder / "credentials" / "bridge"
    folder.mkdir(parents=True)
    secret = folder / "sinks.events.url"
    secret.write_text(url_of(world.rabbitmq, "both", HOST))
    secret.chmod(0o604)
    yield {}
    secret.unlink()
    folder.rmdir()
    folder.parent.rmdir()


@contextmanager
def open_transaction(world: World) -> Iterator[Mapping[str, str]]:
    with pytest.MonkeyPatch.context() as patch, psycopg.connect(world.postgres.dsn("shop")) as connection:
        patch.setattr(check_database, "OLD_TRANSACTION", 0.0)
        connection.execute("select pg_current_xact_id()")
        yield {}


def listens(address: str) -> Mapping[str, str]:
    return {"[[routes]]": f'[observe]\nlisten = "{address}"\n[[routes]]'}


@dataclass(frozen=True)
class Broken:
    """What is broken, and what must be said of it."""

    subject: str
    says: Sequence[str]
    code: int = 0
    """0: it is a warning."""
    change: Mapping[str, str] = field(default_factory=dict)
    """What is replaced in the settings."""
    sql: str = ""
    undo: str = ""
    user: str = "both"
    """On the broker."""
    on: str = "rabbitmq"
    processes: Sequence[Process] = BOTH
    settings: str = SETTINGS
    mode: int = 0o600
    """Who may read the settings."""
    around: Around = unbroken
    also: Sequence[str] = ()
    """Subjects of which something follows from it."""


ROUTE: Final = '[[routes]]\ntopic = "shop.#"\nsink = "events"\n'
HANDLER: Final = 'handler = "tests.support.worker_handlers:echo"'
ONLY_BRIDGE: Final[Sequence[Process]] = ("bridge",)
ONLY_WORKERS: Final[Sequence[Process]] = ("workers",)

BROKEN: Final[Mapping[str, Broken]] = {
    # Settings
    "no sink": Broken(
        "routes",
        ["sinks: there is none, so no event goes anywhere"],
        78,
        settings='name = "shop"\n[postgres]\ndsn = "{bridge}"\n',
    ),
    "no route": Broken(
        "routes", ["routes: there is none, so every event becomes a dead letter (no_route)"], 78, change={ROUTE: ""}
    ),
    'no route, and `unrouted = "drop"`': Broken(
        "routes",
        ["routes: there is none, so every event is dropped"],
        78,
        change={ROUTE: "", 'name = "shop"': 'name = "shop"\nunrouted = "drop"'},
    ),
    "a sink to which no route leads": Broken(
        "routes",
        ["sinks.spare: no route leads to it"],
        change={"[[routes]]": '[sinks.spare]\ntype = "memory"\n[[routes]]', HANDLER: f'{HANDLER}\nsink = "events"'},
    ),
    "no collector for the spans": Broken(
        "traces",
        [
            "observe.traces: the collector at localhost:4318 takes no spans: Connection refused",
            "correct OTEL_EXPORTER_OTLP_ENDPOINT",
        ],
        change={"[[routes]]": "[observe]\ntraces = true\n[[routes]]"},
    ),
    "a channel that no route takes": Broken(
        "channel stock",
        ["channels.listen: no route takes the topic 'stock', so what is heard becomes a dead letter"],
        change={"[[routes]]": '[channels]\nlisten = ["stock"]\n[[routes]]'},
        also=["channel stock"],
    ),
    "a worker whose topics no route brings to its sink": Broken(
        "routes",
        ["workers.invoices.subscribe: no route brings shop.order.placed to the sink 'events'"],
        change={'topic = "shop.#"': 'topic = "shop.*.paid"'},
    ),
    "bridge and worker at one port": Broken(
        "ports",
        ["observe.listen and workers.invoices.listen are both 127.0.0.1:9187", "a port of its own"],
        78,
        change={**listens("127.0.0.1:9187"), HANDLER: f'{HANDLER}\nlisten = "127.0.0.1:9187"'},
    ),
    "all of this machine's addresses beside one of them": Broken(
        "ports",
        ["observe.listen and workers.invoices.listen are both 0.0.0.0:9187 and 127.0.0.1:9187"],
        78,
        change={**listens("0.0.0.0:9187"), HANDLER: f'{HANDLER}\nlisten = "127.0.0.1:9187"'},
    ),
    "a port that another process has": Broken(
        "ports",
        ["observe.listen: 127.0.0.1:", "is in use, and no process there answers /health as 'shop'"],
        around=taken_port,
    ),
    "a port that something else has": Broken(
        "ports", ["workers.invoices.listen: 127.0.0.1:", "answers /health as 'invoices'"], around=deaf_port
    ),
    "an address of another machine": Broken(
        "ports", ["observe.listen: 192.0.2.1:9187 cannot be listened at here"], change=listens("192.0.2.1:9187")
    ),
    "a secret file that everybody may read": Broken(
        "files", ["sinks.events.url_file: ", "holds a secret", "chmod o-r"], around=secret_file
    ),
    "settings with a password that everybody may read": Broken(
        "files", ["sinks.events.url: ", "bridge.toml holds a secret", "chmod o-r"], mode=0o644
    ),
    "a credential that everybody may read": Broken(
        "files", ["sinks.events.url: ", "credentials/bridge/sinks.events.url holds a secret"], around=credential
    ),
    # PostgreSQL
    "no server": Broken(
        "postgres",
        ["does not answer"],
        69,
        change={'[postgres]\ndsn = "': '[postgres]\ndsn = "postgresql://shop_bridge@127.0.0.1:1/shop" # "'},
    ),
    "a database that is not there": Broken(
        "postgres", ['database "gone" does not exist'], 69, change={'/shop"\n[sinks': '/gone"\n[sinks'}
    ),
    "a role whose sessions are read-only": Broken(
        "postgres",
        ["sessions of the role 'shop_bridge' in the database 'shop' are read-only"],
        69,
        sql="alter role shop_bridge set default_transaction_read_only = on",
        undo="alter role shop_bridge reset default_transaction_read_only",
    ),
    "clocks that differ": Broken(
        "clock",
        ["apart", "Let both follow NTP"],
        # The server's clock cannot be set; what the login takes for it can.
        sql="create schema slow; create function slow.clock_timestamp() returns timestamptz language sql as "
        "'select pg_catalog.clock_timestamp() - interval ''90 s'''; grant usage on schema slow to shop_bridge; "
        "alter role shop_bridge set search_path = slow, pg_catalog",
        undo="drop schema slow cascade; alter role shop_bridge reset search_path",
    ),
    "no schema": Broken(
        "schema",
        ["the schema bridge is not installed", "pgbridge migrate"],
        69,
        change={'/shop"\n[sinks': '/empty"\n[sinks'},
    ),
    "a login without its role": Broken(
        "schema",
        ["permission denied", "roles.sql"],
        69,
        sql="revoke bridge_relay from shop_bridge",
        undo="grant bridge_relay to shop_bridge",
    ),
    "a privilege that is missing": Broken(
        "privileges",
        ["the role 'shop_bridge' does not have EXECUTE on bridge.prune(", "grant bridge_relay to shop_bridge"],
        69,
        sql="revoke execute on function bridge.prune from bridge_relay",
        undo="grant execute on function bridge.prune to bridge_relay",
    ),
    "the bridge's login is a superuser": Broken(
        "privileges",
        ["postgres.dsn: 'shop_bridge' is a superuser"],
        sql="alter role shop_bridge superuser",
        undo="alter role shop_bridge nosuperuser",
    ),
    "the bridge's login owns the schema": Broken(
        "privileges",
        ["postgres.dsn: 'shop_bridge' owns the schema bridge"],
        sql="grant postgres to shop_bridge",
        undo="revoke postgres from shop_bridge",
    ),
    "the workers' login is a superuser": Broken(
        "privileges",
        ["workers.dsn: 'shop_workers' is a superuser"],
        sql="alter role shop_workers superuser",
        undo="alter role shop_workers nosuperuser",
    ),
    "commits that do not wait for the disk": Broken(
        "durability",
        ["synchronous_commit = off: a crash of the server forgets"],
        sql="alter role shop_bridge set synchronous_commit = off",
        undo="alter role shop_bridge reset synchronous_commit",
    ),
    "a sequence behind the log": Broken(
        "positions",
        ["the sequence bridge.outbox_id_seq is at 1, and the log already has the id", "select setval("],
        69,
        sql="insert into bridge.outbox (id, event_id, topic, payload, content_type) "
        "values (1000000, gen_random_uuid(), 'shop.a', '1', 'application/json')",
        undo="delete from bridge.outbox where id = 1000000",
    ),
    "a position of a sink that is gone": Broken(
        "positions",
        ["there is a position of the sink 'gone'", "pgbridge cursor forget gone"],
        69,
        sql="insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "values ('shop', 'gone', 0, '3', 1, '{#}')",
        undo="delete from bridge.cursor where sink = 'gone'",
    ),
    "a log whose numbers begin again below a position": Broken(
        "positions",
        ["the sink 'events' is at 5000, and bridge.outbox_id_seq at 1", "restart it"],
        sql="insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "values ('shop', 'events', 5000, '3', 1, '{shop.#}')",
        undo="delete from bridge.cursor where name = 'shop'",
    ),
    "events unsettled for longer than the retention": Broken(
        "log",
        ["nothing is deleted behind what 'other' has not settled", "pgbridge cursor forget"],
        sql="update bridge.outbox set created_at = now() - interval '30 days'; "
        "insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "values ('other', 'events', 0, '3', 1, '{#}')",
        undo="delete from bridge.cursor where name = 'other'; update bridge.outbox set created_at = now()",
    ),
    "an old transaction": Broken(
        "transactions",
        ["role postgres, database shop, idle in transaction has one open for", "vacuum removes nothing"],
        around=open_transaction,
    ),
    "a server without room": Broken(
        "connections",
        ["take up to 110, and there is room for ", "raise its max_connections"],
        change={HANDLER: f"{HANDLER}\nconcurrency = 100"},
    ),
    "a role without room": Broken(
        "connections",
        ["take up to 6, and there is room for 5", "`alter role shop_bridge connection limit N`"],
        sql="alter role shop_bridge connection limit 5",
        undo="alter role shop_bridge connection limit -1",
    ),
    "a database without room": Broken(
        "connections",
        ["take up to 14, and there is room for 13", "`alter database shop connection limit N`"],
        sql="alter database shop connection limit 13",
        undo="alter database shop connection limit -1",
    ),
    # Brokers
    "RabbitMQ elsewhere in plain text": Broken(
        "tls",
        ["sinks.events.url: nothing is encrypted on the way to mq.invalid", "Write amqps://"],
        69,
        change={"hunter2@127.0.0.1": "hunter2@mq.invalid"},
        also=["sink events", "topology"],
    ),
    "NATS elsewhere in plain text": Broken(
        "tls",
        ["sinks.events.url: nothing is encrypted on the way to mq.invalid", "Write tls://"],
        69,
        change={"hunter2@127.0.0.1": "hunter2@mq.invalid"},
        on="nats",
        also=["sink events", "topology"],
    ),
    "no broker": Broken(
        "sink events",
        ["sinks.events.url: RabbitMQ at 127.0.0.1:1 does not answer"],
        69,
        change={'type = "rabbitmq"\nurl = "': 'type = "rabbitmq"\nurl = "amqp://guest@127.0.0.1:1" # "'},
        also=["topology"],
    ),
    "a missing exchange": Broken(
        "topology",
        ["missing: exchange gone (sink events)", "pgbridge topology --apply"],
        69,
        change={'type = "rabbitmq"': 'type = "rabbitmq"\nexchange = "gone"'},
        also=["sink events"],
    ),
    "a missing queue": Broken(
        "topology",
        ["missing: queue others.dead (worker others)"],
        69,
        change={"[workers.invoices]": "[workers.others]"},
    ),
    "an exchange of another kind": Broken(
        "topology",
        ["different: exchange amq.fanout (sink events): ", "inequivalent arg 'type' for exchange 'amq.fanout'"],
        69,
        change={'type = "rabbitmq"': 'type = "rabbitmq"\nexchange = "amq.fanout"'},
        user="admin",
    ),
    "a stream that takes other subjects": Broken(
        "topology",
        ["different: stream elsewhere (sink events): it takes other.>, and not elsewhere.>"],
        69,
        change={'type = "nats"': 'type = "nats"\nstream = "elsewhere"'},
        user="admin",
        on="nats",
        also=["sink events"],
    ),
    "a consumer with other topics": Broken(
        "topology",
        ["different: consumer events -> invoices (worker invoices): it takes events.shop.order.placed"],
        69,
        change={HANDLER: f'{HANDLER}\nsubscribe = ["shop.order.*"]'},
        on="nats",
    ),
    "RabbitMQ: an account that may do nothing": Broken(
        "sink events",
        ["access to exchange 'events' in vhost 'check' refused for user 'nobody'"],
        69,
        user="nobody",
        also=["worker invoices"],
    ),
    "RabbitMQ: the bridge's account may not publish": Broken(
        "sink events",
        ["access to exchange 'events' in vhost 'check' refused for user 'workers'"],
        69,
        user="workers",
        processes=ONLY_BRIDGE,
    ),
    "RabbitMQ: the workers' account may not consume": Broken(
        "worker invoices",
        ["access to queue 'invoices' in vhost 'check' refused for user 'bridge'"],
        69,
        user="bridge",
        processes=ONLY_WORKERS,
    ),
    "RabbitMQ: the workers' account may not publish retries": Broken(
        "worker invoices",
        ["access to exchange 'amq.default' in vhost 'check' refused for user 'reader'"],
        69,
        user="reader",
        processes=ONLY_WORKERS,
    ),
    "RabbitMQ: the bridge's account, in settings that have workers": Broken(
        "worker invoices",
        ["access to queue 'invoices'", "All that the bridge needs this account may do", "pgbridge check --for workers"],
        user="bridge",
    ),
    "RabbitMQ: the workers' account, in settings that have routes": Broken(
        "sink events",
        ["access to exchange 'events'", "All that the workers need this account may do", "pgbridge check --for bridge"],
        user="workers",
    ),
    "RabbitMQ: a topic that the account may not publish": Broken(
        "sink events",
        ["does not permit user 'narrow' to publish the topic 'secret'", "rabbitmqctl set_topic_permissions"],
        69,
        user="narrow",
        change={'topic = "shop.#"': 'topic = "shop.order.placed"\nsink = "events"\n[[routes]]\ntopic = "secret"'},
        processes=ONLY_BRIDGE,
    ),
    "NATS: the bridge's user may not publish": Broken(
        "sink events",
        ["does not permit the user to publish to events.shop, events.shop.>"],
        69,
        user="mute",
        on="nats",
        processes=ONLY_BRIDGE,
    ),
    "NATS: the workers' user may not acknowledge": Broken(
        "worker invoices",
        ["does not permit the user to publish to $JS.ACK.events.invoices.>"],
        69,
        user="no-ack",
        on="nats",
        processes=ONLY_WORKERS,
    ),
    "NATS: the workers' user may not store dead letters": Broken(
        "worker invoices",
        ["does not permit the user to publish to invoices_dead.shop.order.placed"],
        69,
        user="no-letters",
        on="nats",
        processes=ONLY_WORKERS,
    ),
    "NATS: the workers' user may not ask for its consumer": Broken(
        "worker invoices",
        ["does not permit this to the user", "js.api.stream.info.invoices_dead"],
        69,
        user="bridge",
        on="nats",
        processes=ONLY_WORKERS,
        also=["topology"],
    ),
    "NATS: the bridge's user, in settings that have workers": Broken(
        "worker invoices",
        ["All that the bridge needs this account may do", "pgbridge check --for workers"],
        user="bridge",
        on="nats",
        also=["topology"],
    ),
    # Workers
    "a handler that cannot be imported": Broken(
        "topology",
        ["workers.invoices.handler: cannot import nowhere"],
        78,
        change={HANDLER: 'handler = "nowhere:render"'},
    ),
    "an option that the handler does not know": Broken(
        "worker invoices",
        ["workers.invoices.options.x: unknown key"],
        78,
        change={HANDLER: f"{HANDLER}\noptions = {{x = 1}}"},
    ),
    "no reply function": Broken(
        "worker invoices",
        ["workers.invoices.reply: there is no function shop.gone(uuid, jsonb)"],
        69,
        change={"shop.rendered": "shop.gone"},
    ),
    "a reply function with other parameters": Broken(
        "worker invoices",
        ["there is no function shop.wrong(uuid, jsonb)"],
        69,
        change={"shop.rendered": "shop.wrong"},
        sql="create function shop.wrong(event_id text, result jsonb) returns void language sql as ''",
        undo="drop function shop.wrong",
    ),
    "a reply function that the workers' role may not call": Broken(
        "worker invoices",
        ["this role may not call shop.rendered", "GRANT EXECUTE ON FUNCTION"],
        69,
        sql="revoke execute on function shop.rendered from public",
        undo="grant execute on function shop.rendered to public",
    ),
    "a workers' login without its role": Broken(
        "worker invoices",
        ["workers.dsn: "],
        69,
        sql="revoke bridge_worker from shop_workers",
        undo="grant bridge_worker to shop_workers",
    ),
    "no server for the workers": Broken(
        "worker invoices",
        ["workers.dsn: PostgreSQL at 127.0.0.1:1 does not answer"],
        69,
        change={'[workers]\ndsn = "': '[workers]\ndsn = "postgresql://shop_workers@127.0.0.1:1/shop" # "'},
    ),
}

said: dict[str, Finding] = {}
"""By what is broken, what was said of it: the page is made of it."""


async def test_where_nothing_is_broken_every_line_is_ok(world: World) -> None:
    found = await found_in(world.settings("both", on="rabbitmq", change={}))
    assert wrong_of(found) == []
    assert [finding.subject for finding in found] == [
        "routes",
        "postgres",
        "listen",
        "clock",
        "schema",
        "privileges",
        "durability",
        "positions",
        "log",
        "transactions",
        "connections",
        "sink events",
        "topology",
        "worker invoices",
    ]


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_broken_is_named(world: World, broken: str) -> None:
    row = BROKEN[broken]
    with row.around(world) as change:
        world.admin(*row.sql.split("; "))
        try:
            replaced = {**row.change, **change}
            path = world.settings(row.user, on=row.on, change=replaced, mode=row.mode, text=row.settings)
            found = await found_in(path, row.processes)
        finally:
            world.admin(*row.undo.split("; "))
    wrong = wrong_of(found)
    named = [each for each in wrong if each.subject == row.subject and all(words in each.text for words in row.says)]
    assert len(named) == 1, wrong
    assert {each.subject for each in wrong} == {row.subject, *row.also}, wrong
    assert next((each.exit_code for each in wrong if not each.ok), 0) == row.code
    assert not any(PASSWORD in each.text for each in found)
    said[broken] = Finding(row.subject, named[0].ok, world.told(named[0].text), warning=named[0].warning)


PAGE: Final = ROOT / "docs" / "check.md"
TABLE: Final = re.compile(r"(?<=\| what is broken \| what `check` says \|\n\|---\|---\|\n)(?:\|.*\n)*")


def test_the_page_shows_what_is_said() -> None:
    if len(said) < len(BROKEN):
        pytest.skip("not all of it was broken in this run")
    table = "".join(f"| {broken} | {_cell(finding)} |\n" for broken, finding in said.items())
    if os.environ.get("UPDATE_PAGES"):
        PAGE.write_text(TABLE.sub(lambda _: table, PAGE.read_text()))
    shown = TABLE.search(PAGE.read_text())
    assert shown is not None
    assert _without_numbers(shown[0]) == _without_numbers(table)


def _cell(finding: Finding) -> str:
    mark = "warn" if finding.warning else "FAIL"
    return f"`{mark}` **{finding.subject}** {finding.text}".replace("|", "\\|").replace("<", "&lt;")


def _without_numbers(text: str) -> str:
    """Times, sizes and versions differ from run to run."""
    return re.sub(r"\d[\d,.:]*", "0", text)


async def test_the_page_lists_every_subject(world: World) -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    found = await found_in(world.settings("both", on="rabbitmq", change={}))
    subjects = {"settings", *(finding.subject for finding in found), *(row.subject for row in BROKEN.values())}
    kinds = {re.sub(r"^(channel|sink|worker) .*", r"\1 <name>", subject) for subject in subjects}
    assert set(listed) == kinds


async def test_a_port_that_the_daemon_itself_has_is_nothing_to_say_of(world: World) -> None:
    with served_by("shop") as address:
        assert wrong_of(await found_in(world.settings("both", on="rabbitmq", change=listens(address)))) == []


def test_the_addresses_of_a_workers_other_processes_count_too(tmp_path: Path) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text(
        'name = "shop"\n[observe]\nlisten = "127.0.0.1:9404"\n[sinks.events]\ntype = "memory"\n'
        '[workers.hooks]\nhandler = "workers.webhooks:fan_out"\noptions.listen = "127.0.0.1:9404"\n'
        '[workers.cards]\nhandler = "workers.payments:pay"\noptions.listen.address = "127.0.0.1:9404"\n'
    )
    failed = [each for each in of_ports(load(path, environ={}), BOTH) if not each.ok]
    assert [each.text.partition(" are both")[0] for each in failed] == [
        "observe.listen and workers.hooks.options.listen",
        "observe.listen and workers.cards.options.listen.address",
        "workers.hooks.options.listen and workers.cards.options.listen.address",
    ]


async def test_lines_fit_80_columns_and_commands_stay_whole(world: World) -> None:
    change = {"shop.rendered": "shop.gone", **listens("0.0.0.0:9187"), HANDLER: f'{HANDLER}\nlisten = "127.0.0.1:9187"'}
    path = world.settings("bridge", on="rabbitmq", change=change)
    out = await printed("--config", str(path), expect=78)
    assert "FAIL  ports              observe.listen and workers.invoices.listen are both" in out
    assert max(map(len, out.splitlines())) <= 80
    told = [json.loads(line) for line in (await printed("--json", "--config", str(path), expect=78)).splitlines()]
    assert ["settings", *(each["subject"] for each in told)] == [line[6:25].strip() for line in _first_lines(out)]
    [ports] = [each for each in told if each["subject"] == "ports"]
    assert not ports["ok"]
    assert ports["text"] in " ".join(out.split())
    world.admin("revoke execute on function bridge.prune from bridge_relay")
    try:
        out = await printed("--config", str(path), expect=78)
    finally:
        world.admin("grant execute on function bridge.prune to bridge_relay")
    assert "grant bridge_relay to shop_bridge\n" in out


async def test_one_kind_of_process_may_be_looked_at_alone(world: World) -> None:
    path = str(world.settings("workers", on="rabbitmq", change={}))
    out = await printed("--for", "workers", "--config", path)
    assert [line.split()[1] for line in _first_lines(out)] == [
        "settings",
        "connections",
        "topology",
        "worker",
    ]
    out = await printed("--for", "bridge", "--config", path, expect=69)
    assert "worker" not in {line.split()[1] for line in _first_lines(out)}


async def test_each_account_that_systemd_hands_over_is_looked_at_with_its_own_credentials(world: World) -> None:
    for on, server, host in (("rabbitmq", world.rabbitmq, HOST), ("nats", world.nats, "")):
        path = world.settings("nobody", on=on, change={})
        secrets = [world.folder / "credentials" / process / "sinks.events.url" for process in ("bridge", "workers")]
        try:
            for secret in secrets:
                secret.parent.mkdir(parents=True)
                secret.write_text(url_of(server, secret.parent.name, host))
                secret.chmod(0o600)
            out = await printed("--config", str(path))
        finally:
            for secret in secrets:
                secret.unlink()
                secret.parent.rmdir()
            secrets[0].parent.parent.rmdir()
        assert {line[:4] for line in _first_lines(out)} == {"ok  "}, out


@pytest.mark.parametrize(
    ("on", "user", "processes", "subject", "says"),
    [
        ("rabbitmq", "bridge", ONLY_BRIDGE, "sink events", "rabbitmq, answers; may publish to the exchange events"),
        (
            "rabbitmq",
            "workers",
            ONLY_WORKERS,
            "worker invoices",
            "may consume invoices; may publish to the exchange amq.default",
        ),
        (
            "rabbitmq",
            "both",
            BOTH,
            "topology",
            "; binding events -> invoices: shop.order.placed. Where messages do not arrive: `pgbridge topology",
        ),
        ("rabbitmq", "narrow", ONLY_BRIDGE, "sink events", "its topic permissions refuse some topics of shop.#"),
        ("nats", "bridge", ONLY_BRIDGE, "sink events", "nats, answers; may not publish to $JS.API.INFO, so"),
        ("nats", "workers", ONLY_WORKERS, "worker invoices", "reply shop.rendered"),
        ("nats", "part", ONLY_BRIDGE, "sink events", "may publish to a part of events.shop, events.shop.> only"),
        ("nats", "unasked", BOTH, "sink events", "cannot be known: let it publish to $SYS.REQ.USER.INFO"),
    ],
)
async def test_an_account_that_may_do_what_is_needed_lacks_nothing(
    world: World, on: str, user: str, processes: Sequence[Process], subject: str, says: str
) -> None:
    found = await found_in(world.settings(user, on=on, change={}), processes)
    assert wrong_of(found) == []
    assert says in next(finding.text for finding in found if finding.subject == subject)


async def test_no_message_is_published_and_none_is_taken(world: World) -> None:
    async with await aio_pika.connect(url_of(world.rabbitmq, "admin", HOST)) as connection:
        channel = await connection.channel()
        everything = await channel.declare_queue(exclusive=True)
        await everything.bind("events", "#")
        worker = await channel.declare_queue("invoices", passive=True)
        await channel.default_exchange.publish(aio_pika.Message(b"waits"), "invoices")
        assert wrong_of(await found_in(world.settings("both", on="rabbitmq", change={}))) == []
        assert await everything.get(fail=False) is None
        message = await worker.get()
        assert message is not None
        assert (message.body, message.redelivered) == (b"waits", False)
        await message.ack()
        assert await worker.get(fail=False) is None


async def test_nats_hands_out_and_stores_nothing(world: World) -> None:
    connection = await nats.connect(url_of(world.nats, "admin"))
    try:
        jetstream = connection.jetstream()
        await jetstream.publish("events.shop.order.placed", b"waits")
        assert wrong_of(await found_in(world.settings("both", on="nats", change={}))) == []
        consumer = await jetstream.consumer_info("events", "invoices")
        assert (consumer.num_pending, consumer.num_ack_pending) == (1, 0)
        assert (await jetstream.stream_info("events")).state.messages == 1
        assert (await jetstream.stream_info("invoices_dead")).state.messages == 0
        await jetstream.purge_stream("events")
    finally:
        await connection.close()


async def test_while_rabbitmq_blocks_publishers_it_is_said_what_is_not_known(world: World) -> None:
    second = {"[workers]": '[[routes]]\ntopic = "other.#"\nsink = "events"\n[workers]'}
    await asyncio.to_thread(world.rabbitmq.alarm, True)
    try:
        found = await found_in(world.settings("both", on="rabbitmq", change=second))
    finally:
        await asyncio.to_thread(world.rabbitmq.alarm, False)
    assert wrong_of(found) == []
    said = {finding.subject: finding.text for finding in found}
    blocked = "of the topics other.# this cannot be known while the broker blocks publishers"
    assert said["sink events"] == f"rabbitmq, answers; may publish to the exchange events; {blocked}"
    assert said["worker invoices"].endswith("may publish to the exchange amq.default")


async def test_how_large_the_log_becomes_is_told_from_its_age_and_size(world: World) -> None:
    world.admin("update bridge.outbox set created_at = now() - interval '2 days'")
    try:
        found = await found_in(world.settings("both", on="rabbitmq", change={}))
    finally:
        world.admin("update bridge.outbox set created_at = now()")
    [text] = [finding.text for finding in found if finding.subject == "log"]
    told = re.match(
        r"([\d.]+) MB, with events of 2 d; they stay for 7 d: at ([\d.]+) MB a day about ([\d.]+) MB\.", text
    )
    assert told is not None, text
    size, a_day, in_all = map(float, told.groups())
    assert a_day == pytest.approx(size / 2, abs=0.1)
    assert in_all == pytest.approx(size * 3.5, abs=0.4)


def test_all_that_roles_sql_grants_to_the_bridge_is_asked_for(world: World) -> None:
    with psycopg.connect(world.postgres.dsn("shop")) as admin:
        functions = admin.execute(
            "select p.oid::regprocedure::text from pg_proc p where p.pronamespace = 'bridge'::regnamespace "
            "and has_function_privilege('bridge_relay', p.oid, 'execute')"
        ).fetchall()
        asked = admin.execute(
            "select f::regprocedure::text from unnest(%s::text[]) f", [list(check_database.FUNCTIONS)]
        ).fetchall()
        tables = admin.execute(
            "select c.oid::regclass::text, privilege from pg_class c, unnest('{select,insert,update,delete}'::text[]) "
            "as privilege where c.relnamespace = 'bridge'::regnamespace and c.relkind = 'r' "
            "and has_table_privilege('bridge_relay', c.oid, privilege)"
        ).fetchall()
    assert sorted(functions) == sorted(asked)
    assert sorted(tables) == sorted(
        (table, privilege) for table, privileges in check_database.TABLES.items() for privilege in privileges
    )
