"""What comes to the port of `/health` must not take the bridge, or its watchdog, down."""

import asyncio
import contextlib
import resource
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.servers import free_port
from tests.support.until import until

FILES = 64
"""File descriptors that the bridge may have: a burst needs more."""


def connections(port: int, count: int) -> list[socket.socket]:
    """So many to this port, on which nothing is said, or fewer where no more are taken."""
    made: list[socket.socket] = []
    with contextlib.suppress(TimeoutError):
        while len(made) < count:
            made.append(socket.create_connection(("127.0.0.1", port), timeout=5.0))
    return made


class Systemd:
    """The socket to which a service says how it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[str] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))

    def hear(self) -> list[str]:
        """All that was said since the start."""
        while True:
            try:
                self.heard.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return self.heard

    async def heard_again(self, state: str, times: int) -> None:
        """Waits until it was said so many times more."""
        before = self.hear().count(state)
        await until(lambda: self.hear().count(state) >= before + times, f"{state} is said {times} times more")


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    yield systemd
    systemd.socket.close()


async def test_a_burst_of_connections_starves_neither_the_watchdog_nor_the_bridge(
    bridge_database: str, messages: Messages, systemd: Systemd, tmp_path: Path
) -> None:
    port = free_port()
    text = settings(bridge_database, messages, f'[observe]\nlisten = "127.0.0.1:{port}"')
    with Daemon(tmp_path, text) as bridge:
        bridge.wait_for("bridge.leading")
        assert bridge.process is not None
        resource.prlimit(bridge.process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        await systemd.heard_again("WATCHDOG=1", 1)
        burst = await asyncio.to_thread(connections, port, 4 * FILES)
        await systemd.heard_again("WATCHDOG=1", 3)
        await execute(bridge_database, "select bridge.emit('shop.test', '1'::text)")
        await messages.take(1)
        for connection in burst:
            connection.close()

        def answers() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return bool(answer.status == 200)

        assert await asyncio.to_thread(answers)
        assert bridge.stop() == 0
    assert "STOPPING=1" in systemd.hear()


async def test_connections_that_say_nothing_make_room_for_others(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    text = settings(bridge_database, messages, f'[observe]\nlisten = "127.0.0.1:{port}"')
    with Daemon(tmp_path, text) as bridge:
        bridge.wait_for("bridge.leading")
        silent = await asyncio.to_thread(connections, port, 200)

        async def answers() -> bool:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health HTTP/1.0\r\n\r\n")
                line = await reader.readline()
                writer.close()
            except OSError:
                return False
            return line.startswith(b"HTTP/1.0 200")

        await until(answers, "/health answers beside silent connections")
        for connection in silent:
            connection.close()
        assert bridge.stop() == 0
