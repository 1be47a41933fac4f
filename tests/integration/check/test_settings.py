"""What `pgbridge check` says of settings, files and ports, before it asks any server."""

import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest
from prometheus_client import CollectorRegistry

from bridge.commands.check import BOTH
from bridge.commands.check_settings import of_ports
from bridge.process.health import Health, serving
from bridge.settings import load
from tests.support.checked import HANDLER, Broken, Section, World, found_in, wrong_of
from tests.support.narrow import PASSWORD
from tests.support.servers import free_port


@contextmanager
def served_by(name: str) -> Iterator[str]:
    """The address of a process that calls itself so."""
    address = f"127.0.0.1:{free_port()}"
    with serving("observe.listen", address, lambda: Health(name, "leading"), CollectorRegistry()):
        yield address


def listens(address: str) -> Mapping[str, str]:
    return {"[[routes]]": f'[observe]\nlisten = "{address}"\n[[routes]]'}


@asynccontextmanager
async def taken_port(world: World) -> AsyncIterator[Mapping[str, str]]:
    with served_by("another") as address:
        yield listens(address)


@asynccontextmanager
async def deaf_port(world: World) -> AsyncIterator[Mapping[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield {HANDLER: f'{HANDLER}\nlisten = "127.0.0.1:{taken.getsockname()[1]}"'}


def dsn_of(world: World) -> str:
    """With a password, for which this server does not ask."""
    return world.postgres.dsn("shop", "shop_bridge").replace("@", f":{PASSWORD}@")


@asynccontextmanager
async def secret_file(world: World) -> AsyncIterator[Mapping[str, str]]:
    secret = world.folder / "dsn"
    secret.write_text(dsn_of(world))
    secret.chmod(0o644)
    yield {f'dsn = "{world.postgres.dsn("shop", "shop_bridge")}"': f'dsn_file = "{secret}"'}
    secret.unlink()


@asynccontextmanager
async def credential(world: World) -> AsyncIterator[Mapping[str, str]]:
    folder = world.folder / "credentials" / "bridge"
    folder.mkdir(parents=True)
    secret = folder / "postgres.dsn"
    secret.write_text(dsn_of(world))
    secret.chmod(0o604)
    yield {}
    secret.unlink()
    folder.rmdir()
    folder.parent.rmdir()


ROUTE: Final = '[[routes]]\ntopic = "shop.#"\nsink = "events"\n'

BROKEN: Final[Mapping[str, Broken]] = {
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
        "files", ["postgres.dsn_file: ", "holds a secret", "chmod o-r"], around=secret_file
    ),
    "settings with a password that everybody may read": Broken(
        "files",
        ["postgres.dsn: ", "bridge.toml holds a secret", "chmod o-r"],
        mode=0o644,
        change={"shop_bridge@": f"shop_bridge:{PASSWORD}@"},
    ),
    "a credential that everybody may read": Broken(
        "files", ["postgres.dsn: ", "credentials/bridge/postgres.dsn holds a secret"], around=credential
    ),
}

SECTION: Final = Section("Settings, files and ports", BROKEN)


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_broken_is_named(shop_world: World, broken: str) -> None:
    await SECTION.breaks(shop_world, broken)


def test_the_page_shows_what_is_said() -> None:
    SECTION.compare_with_page()


async def test_a_port_that_the_daemon_itself_has_is_nothing_to_say_of(shop_world: World) -> None:
    with served_by("shop") as address:
        assert wrong_of(await found_in(shop_world.settings(change=listens(address)))) == []


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
