"""The real servers, durable as in production, and the logs of events that the contenders read."""

import base64
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psycopg

from bridge.postgres.schema import migrate
from tests.bench.rounds import Plan, say
from tests.support.servers import NatsServer, PostgresServer, PubSubEmulator, RabbitMQServer, Server

S = TypeVar("S", bound=Server)

TOPIC = "bench.event"
"""Events' topics are this with a number behind, `bench.event.0` and up."""

POSTGRES = {
    # All that makes a commit durable stays at its default, which is on.
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
}


@dataclass(frozen=True, slots=True)
class Log:
    """A backlog to be read: `events` rows in the outbox of a database of its own."""

    dsn: str
    events: int
    first: int
    """The lowest id."""
    last: int
    """The highest id, which is the mark of a bridge that has settled everything."""
    size: int
    """Bytes of a payload."""
    topics: int
    keys: int


class World:
    """Servers start when the first theme asks for them, and end with the block."""

    def __init__(self, *, quick: bool, rounds: Plan, beside: Path | None = None) -> None:
        """`beside` is the interpreter of an environment with another version of the bridge."""
        self.quick = quick
        self.rounds = rounds
        self.beside = beside
        self._stack = ExitStack()
        self._logs: dict[tuple[int, int, int, int, Path | None], Log] = {}
        self._names = 0

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="pgbridge-bench-"))
        # As root, PostgreSQL runs as another user, who must be able to enter.
        self.folder.chmod(0o755)
        self._stack.callback(shutil.rmtree, self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, server: S) -> S:
        say(f"  starting {server.name}")
        self._stack.enter_context(server)
        return server

    @cached_property
    def postgres(self) -> PostgresServer:
        return self._start(PostgresServer(self.folder, settings=POSTGRES))

    @cached_property
    def rabbitmq(self) -> RabbitMQServer:
        return self._start(RabbitMQServer(self.folder))

    @cached_property
    def nats(self) -> NatsServer:
        return self._start(NatsServer(self.folder))

    @cached_property
    def pubsub(self) -> PubSubEmulator:
        return self._start(PubSubEmulator(self.folder))

    @property
    def pythons(self) -> tuple[Path | None, ...]:
        """The interpreters of the versions of the bridge that take part: None is this one."""
        return (None,) if self.beside is None else (None, self.beside)

    def unique(self, prefix: str) -> str:
        """A name that this run has not used before: of a bridge, a queue, a database."""
        self._names += 1
        return f"{prefix}{self._names}"

    def database(self, python: Path | None = None, name: str | None = None) -> str:
        """The DSN of a new database with the schema `bridge`; of another version where its interpreter is given."""
        dsn = self.postgres.create_database(name or self.unique("bench"))
        if python is None:
            migrate(dsn)
        else:
            program = "import sys; from bridge.postgres.schema import migrate; migrate(sys.argv[1])"
            subprocess.run([str(python), "-P", "-c", program, dsn], check=True, cwd=self.folder)
        return dsn

    def log(
        self, events: int, *, size: int = 200, topics: int = 1, keys: int = 1000, python: Path | None = None
    ) -> Log:
        """A log of that kind; several themes share one. Every reader brings a cursor of its own.

        With `python`, the schema is that of another version.
        """
        kind = (events, size, topics, keys, python)
        if kind not in self._logs:
            say(f"  writing {events} events of {size} bytes, {topics} topics, {keys} keys")
            self._logs[kind] = fill(self.database(python), events, size, topics, keys)
        return self._logs[kind]

    def describe(self) -> str:
        """The versions of the servers that have run."""
        found = []
        if "postgres" in self.__dict__:
            with psycopg.connect(self.postgres.dsn()) as connection:
                found.append(f"PostgreSQL {connection.info.server_version // 10000} (fsync on)")
        if "rabbitmq" in self.__dict__:
            found.append(f"RabbitMQ {self.rabbitmq.ctl('version').strip()} (quorum queue, persistent, confirms)")
        if "nats" in self.__dict__:
            found.append("NATS JetStream (file storage)")
        if "pubsub" in self.__dict__:
            found.append("Pub/Sub emulator")
        return ", ".join(found)


def payloads(events: int, size: int) -> Iterator[str]:
    """JSON objects of exactly `size` bytes, each different, that compression gains nothing on."""
    noise = base64.b64encode(random.Random(7).randbytes(size)).decode()
    for number in range(events):
        head = f'{{"n":{number},"text":"'
        room = size - len(head) - 2
        yield f'{head}{noise[:room]}"}}'


def fill(dsn: str, events: int, size: int, topics: int, keys: int) -> Log:
    """Writes a backlog into an empty log."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        # 1 MB payloads are base64 of noise: do not let TOAST try to compress them.
        connection.execute("alter table bridge.outbox alter column payload set storage external")
    return append(dsn, events, size, topics, keys)


def append(dsn: str, events: int, size: int, topics: int, keys: int) -> Log:
    """Writes a backlog above what is there, in one transaction, then makes all as settled on disk as an old one is."""
    with psycopg.connect(dsn, autocommit=True) as connection, connection.cursor() as cursor:
        before = cursor.execute("select coalesce(max(id), 0) from bridge.outbox").fetchone()
        with cursor.copy("copy bridge.outbox (topic, key, payload, content_type) from stdin") as copy:
            for number, payload in enumerate(payloads(events, size)):
                copy.write_row((f"{TOPIC}.{number % topics}", f"key-{number % keys}", payload, "application/json"))
        cursor.execute("vacuum (analyze, freeze) bridge.outbox")
        cursor.execute("checkpoint")
        row = cursor.execute("select count(*), min(id), max(id) from bridge.outbox where id > %s", before).fetchone()
    assert row is not None
    if row[0] != events:
        raise RuntimeError(f"the log holds {row[0]} events instead of {events}")
    return Log(dsn, events, row[1], row[2], size, topics, keys)
