"""What a process answers over HTTP, and that no client keeps others from hearing it."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from structlog.testing import capture_logs

from bridge.process import bounded_server, health
from bridge.process.exposition import Labelled
from bridge.process.health import Health, serving
from tests.support.metrics import get
from tests.support.servers import free_port
from tests.support.until import until

WELL = Health("shop", "leading")
ASK = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


@contextmanager
def served(say: Callable[[], Health] = lambda: WELL, metrics: Collector | None = None) -> Iterator[int]:
    """The port at which it is served."""
    port = free_port()
    with serving("observe.listen", f"127.0.0.1:{port}", say, metrics or CollectorRegistry()):
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def said(connection: socket.socket) -> bytes:
    """All that comes until the other side ends it."""
    heard = b""
    try:
        while more := connection.recv(65536):
            heard += more
    except ConnectionError:
        pass
    return heard


async def test_livez_fails_while_the_event_loop_stands_still_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "STANDS_STILL", 0.3)
    monkeypatch.setattr(health, "_BEAT", 0.05)

    def answers() -> Iterator[bytes]:
        while True:
            with connect(port) as asking:
                asking.sendall(ASK)
                yield said(asking)

    def wait_for(status: bytes) -> bytes:
        return next(answer for answer in answers() if answer.startswith(b"HTTP/1.0 " + status))

    failing = Health("shop", "waiting for PostgreSQL", ("postgres: lost",), unready="postgres: lost")
    with served(lambda: failing) as port, ThreadPoolExecutor(1) as others:
        await asyncio.to_thread(wait_for, b"200")
        # Meanwhile this thread, and so the event loop, waits.
        assert b'"status": "stuck"' in others.submit(wait_for, b"503").result(timeout=30)
        assert b'"status": "alive"' in await asyncio.to_thread(wait_for, b"200")


async def test_readyz_tells_whether_the_work_is_done_and_health_whether_all_is_well() -> None:
    now = Health("shop", "leading", ("sink a: lost for 3 s: it does not answer",), ("sink b: paused",))
    with served(lambda: now) as port:
        status, text = await get(port, "/readyz")
        assert (status, json.loads(text)) == (
            200,
            {"status": "ready", "name": "shop", "role": "leading", "reason": None},
        )
        status, text = await get(port, "/health")
        assert (status, json.loads(text)) == (
            503,
            {
                "status": "failing",
                "name": "shop",
                "role": "leading",
                "problems": ["sink a: lost for 3 s: it does not answer"],
                "paused": ["sink b: paused"],
            },
        )
        now = Health("shop", "stopping", unready="it neither leads nor stands by: stopping")
        status, text = await get(port, "/readyz")
        assert (status, json.loads(text)["status"], json.loads(text)["reason"]) == (503, "not ready", now.unready)
        assert (await get(port, "/health"))[0] == 200


async def test_another_path_names_those_that_there_are() -> None:
    with served() as port:
        status, text = await get(port, "/")
    assert (status, json.loads(text)) == (404, {"paths": ["/health", "/livez", "/metrics", "/readyz"]})


@pytest.mark.parametrize(
    ("request_line", "begins", "has_body"),
    [
        (b"HEAD /livez HTTP/1.1", b"HTTP/1.0 200 ", False),
        (b"GET /livez?verbose=1 HTTP/1.1", b"HTTP/1.0 200 ", True),
        (b"POST /livez HTTP/1.1", b"HTTP/1.0 501 ", True),
    ],
)
async def test_only_looking_is_answered(request_line: bytes, begins: bytes, has_body: bool) -> None:
    with served() as port, connect(port) as asking:
        asking.sendall(request_line + b"\r\n\r\n")
        answer = await asyncio.to_thread(said, asking)
    assert answer.startswith(begins)
    assert bool(answer.partition(b"\r\n\r\n")[2]) == has_body


async def test_a_defect_behind_an_answer_is_said_and_logged() -> None:
    def crash() -> Health:
        raise ZeroDivisionError

    with capture_logs() as logs, served(crash) as port:
        assert (await get(port, "/health"))[0] == 500
    assert [(line["event"], line["path"]) for line in logs] == [("http.crashed", "/health")]


async def test_a_question_that_is_too_large_is_refused() -> None:
    with served() as port, connect(port) as asking:
        asking.sendall(b"GET /livez HTTP/1.1\r\nCookie: " + bounded_server.LARGEST * b"a")
        assert (await asyncio.to_thread(said, asking)).startswith(b"HTTP/1.0 431 ")


async def test_a_client_that_asks_byte_by_byte_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "PATIENCE", 0.5)

    def trickle(connection: socket.socket) -> float:
        began = time.monotonic()
        connection.settimeout(0.02)
        while time.monotonic() < began + 20:
            try:
                connection.sendall(b"a")
                if not connection.recv(1):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        return time.monotonic() - began

    with served() as port, connect(port) as slow:
        assert 0.4 < await asyncio.to_thread(trickle, slow) < 15


async def test_a_client_that_says_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "PATIENCE", 0.3)
    with served() as port, connect(port) as silent:
        assert await asyncio.to_thread(said, silent) == b""


class Large(Collector):
    """More than the buffers of a connection hold."""

    def collect(self) -> Iterator[Metric]:
        metric = Metric("large", "x" * 20_000_000, "gauge")
        metric.add_sample("large", {}, 1.0)
        yield metric


async def test_a_client_that_does_not_take_its_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "PATIENCE", 0.5)
    with served(metrics=Large()) as port, ExitStack() as stack:
        asking = [stack.enter_context(connect(port)) for _ in range(bounded_server.CONNECTIONS)]
        for connection in asking:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")

        async def answers() -> bool:
            try:
                return (await get(port, "/livez"))[0] == 200
            except OSError:
                return False

        await until(answers, "others are answered again")
        assert len(await asyncio.to_thread(said, asking[0])) < 20_000_000


async def test_clients_that_say_nothing_make_room_for_one_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "PATIENCE", 300.0)
    with served() as port, ExitStack() as stack:
        silent = [stack.enter_context(connect(port)) for _ in range(5 * bounded_server.CONNECTIONS)]
        for connection in silent:
            connection.send(b"G")
        assert (await get(port, "/livez"))[0] == 200
        # Those who have come first have left, and the last ones may still ask.
        assert await asyncio.to_thread(said, silent[0]) == b""
        silent[-1].sendall(ASK[1:])
        assert (await asyncio.to_thread(said, silent[-1])).startswith(b"HTTP/1.0 200 ")


async def test_all_metrics_have_the_labels_of_their_process_and_no_time_of_creation() -> None:
    registry = CollectorRegistry()
    Counter("a_total", "A", ["sink"], registry=registry).labels("x").inc()
    Gauge("b", "B", registry=registry).set(2)
    with served(metrics=Labelled(registry, bridge="shop")) as port:
        _, text = await get(port, "/metrics")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == ['a_total{bridge="shop",sink="x"} 1.0', 'b{bridge="shop"} 2.0']


def test_a_label_of_a_metric_wins_over_one_of_its_process() -> None:
    registry = CollectorRegistry()
    Gauge("b", "B", ["worker"], registry=registry).labels("own").set(2)
    (family,) = Labelled(registry, worker="other").collect()
    assert family.samples[0].labels == {"worker": "own"}
