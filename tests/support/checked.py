"""What the tests of `pgbridge check` share: servers on which nothing is broken, things that are broken there for a
while and what must be said of each, and docs/check.md, which shows what was said.

`UPDATE_PAGES=1 pytest tests/integration/check` writes the page's tables anew.
"""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg
import pytest
from click.testing import CliRunner

from bridge.brokers.registry import broker_of
from bridge.commands.check import BOTH, Finding, check, findings
from bridge.commands.check_brokers import subscriptions
from bridge.commands.check_database import NAME
from bridge.settings import Process, Settings, load
from tests.support.environment import ROOT
from tests.support.narrow import PASSWORD
from tests.support.servers import PostgresServer

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
HANDLER: Final = 'handler = "tests.support.worker_handlers:echo"'
MEMORY: Final = 'type = "memory"'
"""The table of a sink that needs no broker."""

ONLY_BRIDGE: Final[Sequence[Process]] = ("bridge",)
ONLY_WORKERS: Final[Sequence[Process]] = ("workers",)


@dataclass(frozen=True)
class World:
    """Servers on which nothing is broken."""

    postgres: PostgresServer
    folder: Path
    """Where settings are."""
    sink: Callable[[str], str] = lambda user: MEMORY
    """The table of the sink for a user of the broker."""
    ports: dict[int, int] = field(default_factory=dict)
    """The broker's, and the usual one in its place."""

    def settings(
        self, user: str = "", *, change: Mapping[str, str] | None = None, mode: int = 0o600, text: str = SETTINGS
    ) -> Path:
        """The file of settings in which a user of the broker is used, with something replaced."""
        text = text.format(
            bridge=self.postgres.dsn("shop", "shop_bridge"),
            worker=self.postgres.dsn("shop", "shop_workers"),
            sink=self.sink(user),
        )
        for old, new in (change or {}).items():
            assert old in text, f"{old!r} is not in the settings"
            text = text.replace(old, new)
        path = self.folder / "bridge.toml"
        path.write_text(text)
        path.chmod(mode)
        return path

    def admin(self, statements: str) -> None:
        """Runs SQL as the superuser."""
        with psycopg.connect(self.postgres.dsn("shop"), autocommit=True, application_name=NAME) as connection:
            connection.execute(statements.encode())

    def told(self, text: str) -> str:
        """What was said, with the usual ports and folders in the place of these servers'."""
        for port, usual in ((self.postgres.port, 5432), *self.ports.items()):
            text = text.replace(f"port {port}", f"port {usual}").replace(f"127.0.0.1:{port}", f"127.0.0.1:{usual}")
        return text.replace(str(self.folder), "/etc/pgbridge")


async def declare(settings: Settings) -> None:
    """As `pgbridge topology --apply`."""
    sink = settings.sinks["events"]
    await broker_of(sink).sink(sink).topology(apply=True)
    for _, subscription in subscriptions(settings).values():
        await broker_of(sink).queue(sink, subscription).topology(apply=True)


async def found_in(path: Path, processes: Sequence[Process] = BOTH) -> list[Finding]:
    """What `check` finds with this file of settings."""
    settings = load(path, environ={})
    return [finding async for finding in findings(settings, processes=processes, config=path)]


def wrong_of(found: Sequence[Finding]) -> list[Finding]:
    """Warnings and failures."""
    return [finding for finding in found if finding.warning or not finding.ok]


async def printed(*arguments: str, expect: int = 0) -> str:
    """What `pgbridge check` prints where there is no terminal."""
    done = await asyncio.to_thread(CliRunner().invoke, check, arguments)
    assert done.exit_code == expect, done.output
    return done.output


def first_lines(out: str) -> list[str]:
    """Of each finding."""
    return [line for line in out.splitlines() if not line.startswith(" ")]


@contextmanager
def credentials(folder: Path, key: str, values: Mapping[Process, str]) -> Iterator[None]:
    """What systemd hands over to bridge and workers, beside the settings in this folder."""
    secrets = {folder / "credentials" / process / key: value for process, value in values.items()}
    for secret, value in secrets.items():
        secret.parent.mkdir(parents=True)
        secret.write_text(value)
        secret.chmod(0o600)
    try:
        yield
    finally:
        shutil.rmtree(folder / "credentials")


Around = Callable[[World], AbstractAsyncContextManager[Mapping[str, str]]]
"""Breaks something for a while; gives what is to be replaced in the settings."""


async def lacks_nothing(world: World, user: str, processes: Sequence[Process], subject: str, says: str) -> None:
    """Requires that an account of the broker is found to have all that these processes need, and what is said of it."""
    found = await found_in(world.settings(user), processes)
    assert wrong_of(found) == []
    assert says in next(finding.text for finding in found if finding.subject == subject)


async def each_uses_its_own(world: World, user: str, urls: Mapping[Process, str]) -> None:
    """Requires that each process is looked at with the URL that systemd hands to it, whatever `user` may do."""
    path = world.settings(user)
    with credentials(world.folder, "sinks.events.url", urls):
        out = await printed("--config", str(path))
    assert {line[:4] for line in first_lines(out)} == {"ok  "}, out


@asynccontextmanager
async def _unbroken(world: World) -> AsyncIterator[Mapping[str, str]]:
    yield {}


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
    processes: Sequence[Process] = BOTH
    settings: str = SETTINGS
    mode: int = 0o600
    """Who may read the settings."""
    around: Around = _unbroken
    also: Sequence[str] = ()
    """Subjects of which something follows from it."""


PAGE: Final = ROOT / "docs" / "check.md"


class Section:
    """A table of docs/check.md, and what was said of each thing that is broken for it."""

    def __init__(self, title: str, rows: Mapping[str, Broken]) -> None:
        self._rows = rows
        self._said: dict[str, Finding] = {}
        head = re.escape(f"### {title}\n\n| what is broken | what `check` says |\n|---|---|\n")
        self._table = re.compile(rf"(?<={head})(?:\|.*\n)*")

    async def breaks(self, world: World, broken: str) -> None:
        """Breaks this, and requires that it is named, with what follows from it and nothing else."""
        row = self._rows[broken]
        async with row.around(world) as change:
            world.admin(row.sql)
            try:
                path = world.settings(row.user, change={**row.change, **change}, mode=row.mode, text=row.settings)
                found = await found_in(path, row.processes)
            finally:
                world.admin(row.undo)
        wrong = wrong_of(found)
        about_it = [each for each in wrong if each.subject == row.subject]
        named = [each for each in about_it if all(words in each.text for words in row.says)]
        assert len(named) == 1, wrong
        assert {each.subject for each in wrong} == {row.subject, *row.also}, wrong
        assert next((each.exit_code for each in wrong if not each.ok), 0) == row.code
        assert not any(PASSWORD in each.text for each in found)
        self._said[broken] = Finding(row.subject, named[0].ok, world.told(named[0].text), warning=named[0].warning)

    def compare_with_page(self) -> None:
        """Requires that the page shows what was said. Skips where not all was broken in this run."""
        if len(self._said) < len(self._rows):
            pytest.skip("not all of it was broken in this run")
        table = "".join(f"| {broken} | {_cell(self._said[broken])} |\n" for broken in self._rows)
        if os.environ.get("UPDATE_PAGES"):
            PAGE.write_text(self._table.sub(lambda _: table, PAGE.read_text()))
        shown = self._table.search(PAGE.read_text())
        assert shown is not None
        assert _without_numbers(shown[0]) == _without_numbers(table)


def _cell(finding: Finding) -> str:
    mark = "warn" if finding.warning else "FAIL"
    return f"`{mark}` **{finding.subject}** {finding.text}".replace("|", "\\|").replace("<", "&lt;")


def _without_numbers(text: str) -> str:
    """Times, sizes and versions differ from run to run. RabbitMQ 4 says what kind of access it refuses."""
    return re.sub(r"\d[\d,.:]*", "0", re.sub(r"\b(read|write|configure) access to\b", "access to", text))
