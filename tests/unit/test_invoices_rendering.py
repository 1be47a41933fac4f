"""Typesetting in other processes: whatever a template does ends its process only, and none outlives its worker."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.until import until
from workers.invoices.rendering import TemplateError, Typesetters

TIME = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)

ENDLESS = "#for i in range(100000) { for j in range(100000) { let x = i * j } }"
GREEDY = "#let a = range(1000)\n#for i in range(40) { a = a + a }\n#a.len()"

WORKER = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
from workers.invoices.rendering import Typesetters
typesetters = Typesetters(Path(sys.argv[1]), system_fonts=False, time_limit=60.0, memory_limit=512 << 20)
asyncio.run(typesetters.typeset({}, datetime(2026, 1, 1, tzinfo=UTC)))
print("ready", flush=True)
sys.stdin.read()
"""


class Template:
    """A template that a test edits, and the processes that typeset it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.typesetters = self.with_limits()

    def with_limits(self, *, time_limit: float = 20.0, memory_limit: int = 256 << 20) -> Typesetters:
        self.typesetters = Typesetters(self.path, system_fonts=False, time_limit=time_limit, memory_limit=memory_limit)
        return self.typesetters

    async def typeset(self, text: str, **data: Any) -> bytes:
        self.path.write_text(text, "utf-8")
        return await self.typesetters.typeset(data, TIME)


@pytest.fixture
def template(tmp_path: Path) -> Iterator[Template]:
    template = Template(tmp_path / "own.typ")
    yield template
    template.typesetters.close()


def children(of: int | None = None) -> list[psutil.Process]:
    """The processes that typeset, of this process or another."""
    found = []
    for process in psutil.Process(of).children():
        try:
            if any("typesetter.py" in word for word in process.cmdline()) and process.is_running():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


async def test_a_template_that_never_ends_is_stopped_and_the_next_document_renders(template: Template) -> None:
    template.with_limits(time_limit=3.0)
    with pytest.raises(TemplateError, match="the template ran longer than time_limit, 3 s"):
        await template.typeset(ENDLESS)
    assert (await template.typeset("fine")).startswith(b"%PDF")


async def test_a_template_that_eats_memory_is_stopped_and_the_next_document_renders(template: Template) -> None:
    with pytest.raises(TemplateError, match="the template took more memory than memory_limit, 256 MiB"):
        await template.typeset(GREEDY)
    assert (await template.typeset("fine")).startswith(b"%PDF")


async def test_a_template_that_recurses_for_ever_is_a_mistake_in_it(template: Template) -> None:
    with pytest.raises(TemplateError, match="maximum function call depth exceeded"):
        await template.typeset("#let f(n) = f(n + 1)\n#f(0)")


async def test_one_process_serves_one_document_after_the_other(template: Template) -> None:
    before = children()
    await template.typeset("one")
    [process] = [child for child in children() if child not in before]
    with pytest.raises(TemplateError, match="unknown variable"):
        await template.typeset("#mistake")
    await template.typeset("two")
    assert [child for child in children() if child not in before] == [process]


async def test_a_process_that_died_while_idle_is_replaced(template: Template) -> None:
    before = children()
    await template.typeset("one")
    [process] = [child for child in children() if child not in before]
    process.kill()
    await until(lambda: process.status() == psutil.STATUS_ZOMBIE, "the process is gone")
    assert (await template.typeset("two")).startswith(b"%PDF")


async def test_a_process_that_is_killed_at_work_tells_how_it_ended(template: Template) -> None:
    before = children()
    work = asyncio.create_task(template.typeset(ENDLESS))
    await until(lambda: bool(set(children()) - set(before)), "a process has started")
    [process] = set(children()) - set(before)
    process.kill()
    with pytest.raises(TemplateError, match="the process that typesets was ended by SIGKILL"):
        await work


async def test_a_process_that_cannot_start_tells_why(tmp_path: Path) -> None:
    typesetters = Typesetters(tmp_path / "own.typ", system_fonts=False, time_limit=20.0, memory_limit=1 << 20)
    with pytest.raises(TemplateError, match=r"the process that typesets ended with exit code 1: |memory_limit, 1 MiB"):
        await typesetters.typeset({}, TIME)


async def test_a_cancelled_document_leaves_no_process_behind(template: Template) -> None:
    before = children()
    work = asyncio.create_task(template.typeset(ENDLESS))
    await until(lambda: bool(set(children()) - set(before)), "a process has started")
    [process] = set(children()) - set(before)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await until(lambda: not process.is_running(), "the process is gone, and no zombie")
    assert (await template.typeset("fine")).startswith(b"%PDF")


async def test_there_are_no_more_processes_than_cores(template: Template) -> None:
    before = children()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(set(children()) - set(before)))
            await asyncio.sleep(0.002)

    watcher = asyncio.create_task(watch())
    template.path.write_text("#for i in range(20000) { let x = i }\nfine", "utf-8")
    await asyncio.gather(*(template.typesetters.typeset({"n": n}, TIME) for n in range(20)))
    watcher.cancel()
    assert most == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("how", ["SIGKILL", "end"])
async def test_no_process_outlives_an_idle_worker(how: str, tmp_path: Path) -> None:
    (tmp_path / "own.typ").write_text("fine", "utf-8")
    worker = start_worker(tmp_path / "own.typ")
    assert worker.stdout is not None
    assert await asyncio.to_thread(worker.stdout.readline) == b"ready\n"
    [child] = children(worker.pid)
    if how == "SIGKILL":
        worker.kill()
    worker.communicate()
    await until(lambda: gone(child), "the process is gone")


async def test_no_process_outlives_a_worker_killed_in_the_middle_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "own.typ").write_text(ENDLESS, "utf-8")
    worker = start_worker(tmp_path / "own.typ")
    await until(lambda: any(child.cpu_times().user > 0.3 for child in children(worker.pid)), "it typesets")
    [child] = children(worker.pid)
    worker.kill()
    worker.communicate()
    await until(lambda: gone(child), "the process is gone")


async def test_signals_to_the_whole_group_leave_the_document_in_hand_alone(template: Template) -> None:
    await template.typeset("warm")
    [child] = [child for child in children() if any(str(template.path) in word for word in child.cmdline())]
    for number in (signal.SIGTERM, signal.SIGINT):
        child.send_signal(number)
    assert (await template.typeset("fine")).startswith(b"%PDF")
    assert child.is_running()


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; whether its new parent has noticed is not ours."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def start_worker(template: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(template)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
