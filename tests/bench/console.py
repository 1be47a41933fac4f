"""What the console costs: the bridge's rate beside ten open pages, and each page on a large database."""

import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import psycopg

from bridge.console.pages import PAGES
from tests.bench.bridge import drain, settings_of, wait_until
from tests.bench.processor import processor_time
from tests.bench.rabbit import quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Row, at_least, at_most
from tests.bench.rounds import interleave
from tests.bench.world import World
from tests.support.daemons import Daemon
from tests.support.servers import free_port

ALONE, BESIDE = "alone", "beside ten open pages"
PAGES_OPEN = 10
RENEWALS = 20
"""Of each page, as somebody looks at it for 40 s. The first asks for what is then kept for a while."""

LARGE = """
insert into bridge.outbox (topic, key, content_type, payload)
select 'bench.event.' || n % 10, (n % 1000)::text, 'application/json', '{{"id": ' || n || ', "customer": 42}}'
from generate_series(1, {events}) n;
insert into bridge.inbox (worker, event_id, started_at, finished_at, result)
select 'w' || n % 3, gen_random_uuid(), moment, case when n % 500 > 0 then moment end, '{{}}'
from generate_series(1, {inbox}) n, lateral (select now() - (({inbox} - n) / 300.0) * interval '1 second') m (moment);
insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns)
select 'large', 'events', max(id) - 100, pg_current_xact_id(), 0, '{{bench.#}}' from bridge.outbox;
vacuum (analyze, freeze) bridge.outbox;
vacuum (analyze, freeze) bridge.inbox;
checkpoint;
"""


@theme("console")
def console(world: World) -> Sequence[Row]:
    """A backlog drained beside ten open pages of Flow."""
    log = world.log(20_000 if world.quick else 200_000)

    def alone() -> float:
        with quorum_queue(world) as target:
            return drain(world, log, target.sink).rate

    def beside() -> float:
        with quorum_queue(world) as target, served(world, "open", log.dsn) as base, ExitStack() as pages:
            for _ in range(PAGES_OPEN):
                pages.enter_context(open_page(f"{base}/live/")).wait_for(1)
            return drain(world, log, target.sink).rate

    found = interleave(world.rounds, {ALONE: alone, BESIDE: beside})
    return [found.row(f"console: {BESIDE}", "events/s", ALONE, at_least(0.95), ours=BESIDE)]


@theme("pages")
def pages(world: World) -> Sequence[Row]:
    """Processor time of the database for a renewal of each page of the console."""
    events, inbox = (100_000, 10_000) if world.quick else (10_000_000, 1_000_000)
    dsn = world.database()
    with psycopg.connect(dsn, autocommit=True) as filling:
        for statement in LARGE.format(events=events, inbox=inbox).split(";\n"):
            if statement:
                filling.execute(statement)
    with served(world, "large", dsn) as base, psycopg.connect(world.postgres.dsn(), autocommit=True) as watching:
        paths = {page.title: page.path for page in PAGES if page.in_menu}
        paths |= {"one event": f"/events/{events - 50}", "one worker": "/workers/w1"}
        # Its sessions learn the schema from a cold cache; then it keeps them.
        with open_page(f"{base}/live/") as opened:
            opened.wait_for(1)
        costs = []
        for title, path in paths.items():
            before = _spent(watching)
            with open_page(f"{base}/live{path}") as opened:
                opened.wait_for(RENEWALS)
            spent = _spent(watching) - before
            what = f"pages: {title}, {events} events, {inbox} in the inbox"
            costs.append(Row(what, "ms", [spent / opened.renewals], target=at_most(5)))
    return costs


def _spent(watching: psycopg.Connection[tuple[int]]) -> float:
    """Milliseconds of processor time that the console's sessions in PostgreSQL have used; it keeps them."""
    found = watching.execute("select pid from pg_stat_activity where application_name like 'pgbridge % console'")
    return sum(processor_time(pid) for (pid,) in found) * 1000


@contextmanager
def served(world: World, name: str, dsn: str) -> Iterator[str]:
    """A console as its own process, on its settings' defaults, and its address."""
    address = f"127.0.0.1:{free_port()}"
    text = settings_of("large", dsn, {"type": "memory"}) + f'[console]\nlisten = "{address}"\n'
    with Daemon(world.folder / world.unique(name), text, "console") as process:
        process.wait_for("console.started")
        yield f"http://{address}"


class Opened:
    """A live page that somebody looks at."""

    def __init__(self, url: str) -> None:
        self.renewals = 0
        self._left = threading.Event()
        self._answer = urllib.request.urlopen(url, timeout=60)  # noqa: S310 - on loopback
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        with self._answer as lines:
            for line in lines:
                self.renewals += line == b"\n"  # it ends one
                if self._left.is_set():
                    return

    def wait_for(self, renewals: int) -> None:
        """Until so many have come."""
        wait_until(lambda: self.renewals >= renewals, f"{renewals} renewals", 120.0)

    def close(self) -> None:
        """As a browser leaves: with the next renewal, since nothing else ends a read."""
        self._left.set()
        self._reading.join(30)


@contextmanager
def open_page(url: str) -> Iterator[Opened]:
    """A page that is open meanwhile."""
    opened = Opened(url)
    try:
        yield opened
    finally:
        opened.close()
