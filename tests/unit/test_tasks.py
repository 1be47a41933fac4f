"""Signals that stop a process, and work that is cut short or may finish."""

import asyncio
import signal
import subprocess
import sys

import pytest
from tenacity import wait_none

from bridge.errors import DatabaseUnavailableError
from bridge.process.outage import Outage
from bridge.process.tasks import background, in_own_task, one_error, unless_stopped

PROCESS = """
import asyncio
from bridge.process.logs import configure
from bridge.process.tasks import run, stop_on_signals
from bridge.settings import ObserveSettings
configure(ObserveSettings(log_format="json"))

async def main():
    stop = stop_on_signals("worker", lambda: None)
    print("ready", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    await asyncio.sleep({seconds})

run(main())
"""


def started(seconds: float) -> "subprocess.Popen[str]":
    """A process that needs so long to stop, and is ready for signals."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS.format(seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_lets_a_process_finish(number: signal.Signals) -> None:
    with started(0.0) as process:
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f'"signal": "{number.name}"' in log
    assert '"action": "worker.stopping"' in log


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(second: signal.Signals) -> None:
    with started(60.0) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(second)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 128 + second
    assert '"action": "worker.stopped_at_once"' in log


async def test_a_stop_cancels_work_unless_it_obeys_the_stop_by_itself() -> None:
    stop, obeys = asyncio.Event(), asyncio.Event()
    ends: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0.01)  # longer than a cancellation takes
            ends.append("finished")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async with asyncio.timeout(5):
        await unless_stopped(stop, work())
        stop.set()
        await unless_stopped(stop, work(), obeys=obeys)
        obeys.set()
        await unless_stopped(stop, work(), obeys=obeys)
    assert ends == ["finished", "cancelled", "finished"]


async def test_a_cancellation_in_the_moment_of_a_loss_is_not_lost_with_it() -> None:
    runs = asyncio.Event()

    async def listen() -> None:
        runs.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise DatabaseUnavailableError("the connection is lost")

    async def session() -> None:
        with one_error():
            async with background(listen()):
                await asyncio.Event().wait()

    session_under_way = asyncio.create_task(in_own_task(session()))
    await runs.wait()
    session_under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await session_under_way


async def test_a_loop_comes_back_from_a_loss_that_nobody_cancelled() -> None:
    outage = Outage("server", wait_none())

    async def listen() -> None:
        raise DatabaseUnavailableError("the connection is lost")

    async def session() -> None:
        with one_error():
            # Fails while the task waits for it at the end of the group.
            async with asyncio.TaskGroup() as group:
                group.create_task(listen())

    for _ in range(2):
        with pytest.raises(DatabaseUnavailableError):
            await in_own_task(session())
        await outage.wait()


async def test_a_cancellation_that_a_client_forgot_ends_the_wait_for_the_next_attempt() -> None:
    outage = Outage("server", wait_none())
    asked = asyncio.Event()

    async def ask() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise DatabaseUnavailableError("the connection is lost") from None

    async def come_back() -> None:
        try:
            await ask()
        except DatabaseUnavailableError:
            await outage.wait()

    coming_back = asyncio.create_task(come_back())
    await asked.wait()
    coming_back.cancel()
    with pytest.raises(asyncio.CancelledError):
        await coming_back
