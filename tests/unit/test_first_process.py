"""The programs as the first process of a container, to which the kernel does nothing on a signal without a handler."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import ROOT

CODE = """
import time, pgbridge, bridge.cli, workers.cli
def lasts(prog_name):
    print(prog_name, flush=True)
    time.sleep(60)
bridge.cli.main = workers.cli.main = lasts
pgbridge.{main}()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may begin a world of processes")
@pytest.mark.parametrize(("main", "name"), [("main", "pgbridge"), ("worker_main", "pgbridge-worker")])
def test_whatever_runs_ends_when_it_is_asked_to(main: str, name: str) -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", CODE.format(main=main)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == f"{name}\n"
            [child] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGTERM)
            assert first.wait(10) == 128 + signal.SIGTERM
        finally:
            first.kill()
