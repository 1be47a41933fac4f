"""Webhooks as an operator runs them: a worker and senders as processes, and an endpoint that verifies what it gets."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from bridge.brokers.contract import CONFIRMED
from bridge.brokers.registry import broker_of
from bridge.settings import PostgresSettings, load
from tests.support.daemons import Daemon, run_command
from tests.support.events import make_event
from tests.support.metrics import get
from tests.support.servers import RabbitMQServer, free_port
from tests.support.until import until
from tests.support.webhooks import Webhooks

SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
[sinks.e]
type = "rabbitmq"
url = "{url}"
exchange = "{name}"
[workers.{name}]
handler = "workers.webhooks:fan_out"
subscribe = ["shop.#"]
reply = "bridge.webhook_fan_out"
effects = false
[workers.{name}.options]
timeout = "2s"
schedule = ["50ms", "50ms", "100ms"]
allow = ["127.0.0.0/8"]
listen = "127.0.0.1:{port}"
[observe]
log_format = "json"
"""
EVENTS = 60


class Receiver:
    """Verifies what it gets, as its author would with the public library; every fifth request fails first."""

    def __init__(self) -> None:
        self.secrets: list[str] = []
        self.taken: Counter[str] = Counter()
        self.bodies: dict[str, bytes] = {}
        self.refused: list[str] = []
        self._asked = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(size := int(self.headers["content-length"]))
                if len(body) < size:
                    return  # The process that sent it was killed in between.
                self.send_response(receiver.take(body, {name.lower(): value for name, value in self.headers.items()}))
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    def take(self, body: bytes, headers: dict[str, str]) -> int:
        with self._lock:
            self._asked += 1
            if self._asked % 5 == 0:
                return 503
            try:
                for secret in self.secrets:
                    Webhook(secret).verify(body, headers)
            except Exception as error:  # noqa: BLE001 - whatever is wrong, the test shows it
                self.refused.append(repr(error))
                return 400
            self.taken[headers["webhook-id"]] += 1
            self.bodies[headers["webhook-id"]] = body
            return 200

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    opened = Receiver()
    yield opened
    opened.close()


async def test_each_event_arrives_signed_though_processes_die_and_the_receiver_fails(
    shop: PostgresSettings,
    bridge_database: str,
    rabbitmq: RabbitMQServer,
    unique: str,
    tmp_path: Path,
    receiver: Receiver,
) -> None:
    dsn = json.dumps(shop.dsn.get_secret_value())
    ports = [free_port(), free_port()]
    texts = [SETTINGS.format(dsn=dsn, url=rabbitmq.url, name=unique, port=port) for port in ports]
    worker = Daemon(tmp_path / "worker", texts[0], "run", unique, module="workers.cli")
    senders = [
        Daemon(tmp_path / f"sender-{n}", text, "deliver", unique, module="workers.cli") for n, text in enumerate(texts)
    ]
    done = run_command("topology", "--apply", "--config", str(worker.config))
    assert done.returncode == 0, done.stdout + done.stderr
    settings = load(worker.config, environ={}).sinks["e"]
    sink = broker_of(settings).sink(settings)
    payload = b'{"amount": 12345678901234567890.10, "name":  "\xc3\xbc"}'
    events = [make_event(topic="shop.order.placed", payload=payload) for _ in range(EVENTS)]
    with Webhooks(bridge_database) as hooks:
        endpoint = hooks.add("{shop.order.*}", receiver.url, concurrency=3)
        receiver.secrets.append(hooks.one("select secret from bridge.webhook_secret"))
        try:
            await sink.open()
            worker.start()
            for sender in senders:
                sender.start()
            for sender in senders:
                await asyncio.to_thread(sender.wait_for, "webhook.started")
            assert (await get(ports[1], "/health"))[0] == 200
            # The broker delivers each twice.
            for _ in range(2):
                assert list(await sink.publish(events)) == [CONFIRMED] * EVENTS
            await until(lambda: len(receiver.taken) >= 10, "some have arrived", limit=60)
            senders[0].kill()
            worker.kill()
            worker.start()
            senders[0].start()
            hooks.end_leases()

            def all_done() -> bool:
                hooks.connection.execute(
                    "update bridge.webhook_endpoint set open_until = case when open_until is not null then now() end"
                )
                return hooks.states(endpoint) == {"done": EVENTS}

            await until(all_done, "all are done", limit=90)
            await asyncio.to_thread(senders[0].wait_for, "webhook.started")
            _, metrics = await get(ports[1], "/metrics")
            assert f'pgbridge_webhook_attempts_total{{bridge="shop",outcome="delivered",worker="{unique}"}}' in metrics
            assert [senders[n].stop() for n in range(2)] == [0, 0]
        finally:
            for process in (worker, *senders):
                process.stop()
            await sink.close()
        assert not receiver.refused
        assert set(receiver.taken) == {event.id for event in events}
        # Only what was on the way of the process that was killed may have arrived twice.
        assert sum(receiver.taken.values()) <= EVENTS + 3
        body = receiver.bodies[events[0].id]
        assert body == b'{"type":"shop.order.placed","timestamp":"2026-02-03T04:05:06.000789Z","data":' + payload + b"}"


@pytest.mark.parametrize(
    ("change", "code", "complaint"),
    [
        (('"workers.webhooks:fan_out"', '"workers.payments:pay"'), 78, "api_key"),
        (('"workers.webhooks:fan_out"', '"tests.support.worker_handlers:echo"'), 78, "options"),
        (('reply = "bridge.webhook_fan_out"', ""), 78, "reply"),
        (('timeout = "2s"', 'timeout = "2 years"'), 78, "options.timeout"),
        (('timeout = "2s"', 'proxy = "socks5://proxy:1"'), 78, "proxy"),
        (('timeout = "2s"', 'ca_file = "/nowhere.pem"'), 78, "options"),
    ],
)
def test_settings_that_cannot_send_are_refused_with_their_key(
    tmp_path: Path, change: tuple[str, str], code: int, complaint: str
) -> None:
    text = SETTINGS.format(
        dsn='"host=127.0.0.1 port=1"', url="amqp://guest@127.0.0.1:1", name="hooks", port=free_port()
    )
    assert change[0] in text
    config = tmp_path / "bridge.toml"
    config.write_text(text.replace(*change))
    done = run_command("deliver", "hooks", "--config", str(config), module="workers.cli")
    assert done.returncode == code, done.stderr
    assert "workers.hooks." in done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
