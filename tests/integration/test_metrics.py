"""What running processes serve, and that alerts and dashboard are made of it; with a real Prometheus."""

import asyncio
import json
import re
import subprocess
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from bridge.postgres.sample import SAMPLE, sample_for_ever
from bridge.settings import load
from tests.support.commands import command
from tests.support.daemons import Daemon
from tests.support.environment import ROOT
from tests.support.messages import execute
from tests.support.metrics import get
from tests.support.servers import NatsServer, PostgresServer, free_port
from tests.support.until import until

RULES = ROOT / "deploy/prometheus/pgbridge.rules.yml"
DASHBOARD = ROOT / "deploy/grafana/pgbridge.json"

SETTINGS = """
name = "shop"
[postgres]
dsn = "{dsn}"
[outbox]
standby_interval = "0.05s"
[channels]
listen = ["orders"]
[sinks.events]
type = "nats"
stream = "{name}"
url = "{url}"
[[routes]]
topic = "#"
sink = "events"
[workers.ledger]
handler = "tests.support.worker_handlers:echo"
ordered = true
on_dead_letter = "hold"
listen = "127.0.0.1:{worker}"
[workers.hooks]
handler = "workers.webhooks:fan_out"
subscribe = ["shop.#"]
reply = "bridge.webhook_fan_out"
effects = false
[workers.hooks.options]
listen = "127.0.0.1:{deliver}"
[workers.payments]
handler = "workers.payments:pay"
[workers.payments.options]
api_key = "sk_test_fake"
[workers.payments.options.listen]
address = "127.0.0.1:{notices}"
secret = "whsec_test"
health = "127.0.0.1:{listen}"
[observe]
log_format = "json"
sample_interval = "0.2s"
listen = "127.0.0.1:{bridge}"
"""

BY_LEADER = frozenset(
    f"pgbridge_{name}"
    for name in (
        "backlog_events",
        "oldest_unsent_seconds",
        "sink_paused",
        "dead_letters",
        "notification_queue_usage",
        "oldest_transaction_seconds",
        "outbox_bytes",
        "oldest_event_seconds",
        "scheduled_events",
        "scheduled_overdue_seconds",
    )
)

NO_PANEL: Final = {"process_virtual_memory_bytes": "what Python reserves says nothing of what it uses"}
"""Families that the dashboard leaves out, and why."""


def settings(dsn: str, name: str, nats: NatsServer, ports: Mapping[str, int]) -> str:
    return SETTINGS.format(dsn=dsn, name=name, url=nats.url, notices=free_port(), **ports)


async def families(port: int) -> dict[str, Metric]:
    _, text = await get(port, "/metrics")
    return {family.name: family for family in text_string_to_metric_families(text)}


async def is_ready(port: int) -> bool:
    try:
        return (await get(port, "/readyz"))[0] == 200
    except OSError:
        return False


async def serves(port: int) -> bool:
    try:
        return (await get(port, "/livez"))[0] == 200
    except OSError:
        return False


async def measures(port: int) -> bool:
    return (await families(port)).keys() >= BY_LEADER


@dataclass(frozen=True, slots=True)
class Running:
    """A process of each kind."""

    ports: Mapping[str, int]

    async def families(self, process: str) -> dict[str, Metric]:
        return await families(self.ports[process])

    async def all_names(self) -> set[str]:
        return {name for process in self.ports for name in await self.families(process)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def running(postgres: PostgresServer, nats_server: NatsServer, _migrated: str, folder: Path) -> Iterator[Running]:
    name = "metrics"
    dsn = postgres.copy_database(name, _migrated)
    ports = {process: free_port() for process in ("bridge", "worker", "deliver", "listen")}
    text = settings(dsn, name, nats_server, ports)
    bridge = Daemon(folder / "bridge", text)
    asyncio.run(command("topology", "--apply", "--config", str(bridge.config)))
    workers = [
        Daemon(folder / verb, text, verb, worker, module="workers.cli")
        for verb, worker in (("run", "ledger"), ("deliver", "hooks"), ("listen", "payments"))
    ]

    async def until_all_are_ready() -> None:
        for process, port in ports.items():
            await until(partial(is_ready, port), f"{process} is ready", limit=120)
        await until(lambda: measures(ports["bridge"]), "the leader measures")

    with ExitStack() as stack:
        for daemon in (bridge, *workers):
            stack.enter_context(daemon)
        asyncio.run(until_all_are_ready())
        yield Running(ports)
        for daemon in (bridge, *workers):
            assert daemon.stop() == 0
    postgres.drop_database(name)


@pytest.mark.parametrize(
    ("process", "own", "labels"),
    [
        ("bridge", r"pgbridge_(?!worker_|webhook_|listener_)", {"bridge": "shop"}),
        ("worker", "pgbridge_worker_", {"bridge": "shop", "worker": "ledger"}),
        ("deliver", "pgbridge_webhook_", {"bridge": "shop", "worker": "hooks"}),
        ("listen", "pgbridge_listener_", {"bridge": "shop", "worker": "payments"}),
    ],
)
async def test_a_process_serves_its_own_metrics_and_all_with_its_labels(
    running: Running, process: str, own: str, labels: dict[str, str]
) -> None:
    served = await running.families(process)
    assert any(re.match(own, name) for name in served)
    assert [name for name in served if not re.match(f"{own}|process_", name)] == []
    for family in served.values():
        for sample in family.samples:
            assert labels.items() <= sample.labels.items(), sample


async def test_promtool_finds_nothing_to_mend_in_what_is_served(running: Running, promtool: Path) -> None:
    for port in running.ports.values():
        _, text = await get(port, "/metrics")
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def named(expression: str, served: set[str]) -> set[str]:
    """The families whose metrics an expression names."""
    words = set(re.findall(r"\b(?:pgbridge|process)_\w+", re.sub(r"job=~\"[^\"]*\"", "", expression)))
    found = set()
    for word in words:
        family = re.sub(r"_(total|bucket|sum|count)$", "", word)
        found.add(family if family in served and word not in served else word)
    return found


async def test_each_panel_and_each_alert_names_metrics_that_are_served(running: Running) -> None:
    served = await running.all_names()
    on_panels = {name for expression in expressions() for name in named(expression, served)}
    assert on_panels - served == set()
    groups = yaml.safe_load(RULES.read_text())["groups"]
    in_alerts = {name for group in groups for rule in group["rules"] for name in named(rule["expr"], served)}
    assert in_alerts - served == set()
    # And none is forgotten.
    assert served - on_panels == NO_PANEL.keys()


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A server that scrapes all of them every half second."""

    port: int

    async def ask(self, path: str, **parameters: str) -> Any:
        status, text = await get(self.port, f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        assert status == 200, text
        return json.loads(text)["data"]

    async def is_there(self) -> bool:
        try:
            return (await get(self.port, "/-/ready"))[0] == 200
        except OSError:
            return False


@pytest.fixture
async def scraping(prometheus: Path, running: Running, tmp_path: Path) -> AsyncIterator[Prometheus]:
    port = free_port()
    targets = [f"127.0.0.1:{each}" for each in running.ports.values()]
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "pgbridge", "static_configs": [{"targets": targets}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    words = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([prometheus, *words, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
    try:
        server = Prometheus(port)
        await until(server.is_there, "Prometheus is ready")
        yield server
    finally:
        process.terminate()
        process.wait(30)


async def test_prometheus_answers_each_panel_and_no_alert_fires_while_all_is_well(scraping: Prometheus) -> None:
    for raw in expressions():
        # What shows only what happens has nothing to show here.
        expression = raw.removesuffix(" > 0").replace("$__rate_interval", "10s").replace('"$bridge"', '".+"')
        expression = expression.replace('"$worker"', '".+"')
        assert "$" not in expression

        async def answers(expression: str = expression) -> bool:
            return bool((await scraping.ask("query", query=expression))["result"])

        await until(answers, f"there is something for {raw}")
    rules = [rule for group in (await scraping.ask("rules"))["groups"] for rule in group["rules"]]
    assert [(rule["name"], rule["state"], rule["health"]) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] != "inactive"] == []


async def leads(port: int) -> bool:
    return (await families(port))["pgbridge_leading"].samples[0].value == 1


async def leads_and_measures(port: int) -> bool:
    return await leads(port) and await measures(port)


async def stands_by(port: int) -> bool:
    return not await leads(port) and await is_ready(port)


async def test_the_gauges_of_a_former_leader_go(
    bridge_database: str, nats_server: NatsServer, unique: str, tmp_path: Path
) -> None:
    others = {process: free_port() for process in ("worker", "deliver", "listen")}
    ports = [free_port(), free_port()]
    bridges = [
        Daemon(tmp_path / str(port), settings(bridge_database, unique, nats_server, {"bridge": port, **others}))
        for port in ports
    ]
    await command("topology", "--apply", "--config", str(bridges[0].config))
    with bridges[0], bridges[1]:
        for bridge in bridges:
            bridge.wait_for("bridge.started")
        first, second = (0, 1) if await leads(ports[0]) else (1, 0)
        await only_the_leader_measures(ports[first], ports[second])
        # It loses the lead in the middle of its work; its process goes on, and stands by.
        await hand_over(bridge_database, bridges[first], ports[second])
        await only_the_leader_measures(ports[second], ports[first])
        for bridge in bridges:
            assert bridge.stop() == 0


async def only_the_leader_measures(leader: int, standby: int) -> None:
    await until(partial(leads_and_measures, leader), "the one leads, and measures")
    await until(partial(stands_by, standby), "the other stands by")
    assert BY_LEADER & (await families(standby)).keys() == set()


async def hand_over(dsn: str, leader: Daemon, standby: int) -> None:
    """Ends the session that leads for as long as it is one of this process."""
    assert leader.process is not None
    name = f"%:{leader.process.pid}"
    end = (
        "select pg_terminate_backend(pid) from pg_locks join pg_stat_activity using (pid)"
        " where locktype = 'advisory' and granted and application_name = 'pgbridge shop'"
        " and exists (select from bridge.status() where leader like %s)"
    )

    async def has_gone_over() -> bool:
        await execute(dsn, end, name)
        return await leads(standby)

    await until(has_gone_over, "the other one leads")


async def test_of_two_bridges_that_carry_notifications_from_memory_one_leads(database: str, tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    text = f"""
name = "shop"
[postgres]
dsn = "{database}"
[channels]
listen = ["orders"]
buffer = "memory"
standby_interval = "0.05s"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
[observe]
log_format = "json"
listen = "127.0.0.1:PORT"
"""
    one, two = (Daemon(tmp_path / str(port), text.replace("PORT", str(port))) for port in ports)
    with one:
        await until(partial(serves, ports[0]), "the first answers")
        await until(partial(leads, ports[0]), "the first leads")
        with two:
            await until(partial(serves, ports[1]), "the second answers")
            await until(partial(stands_by, ports[1]), "the second stands by")
            assert one.stop() == 0
            await until(partial(leads, ports[1]), "the second leads")
            # There is no log to measure.
            assert BY_LEADER & (await families(ports[1])).keys() == set()
            assert two.stop() == 0


async def test_gauges_go_while_the_leader_cannot_ask(bridge_database: str, tmp_path: Path) -> None:
    text = f"""
name = "shop"
[postgres]
dsn = "{bridge_database}"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
[observe]
sample_interval = "0.05s"
"""
    (tmp_path / "bridge.toml").write_text(text)
    sampling = asyncio.create_task(sample_for_ever(load(tmp_path / "bridge.toml")))
    await until(lambda: len(SAMPLE.collect()) > 0, "the gauges are known")
    await execute(bridge_database, "alter schema bridge rename to away")
    await until(lambda: len(SAMPLE.collect()) == 0, "they are not known any more")
    await execute(bridge_database, "alter schema away rename to bridge")
    await until(lambda: len(SAMPLE.collect()) > 0, "they are known again")
    sampling.cancel()
    await asyncio.wait([sampling])
    assert len(SAMPLE.collect()) == 0
