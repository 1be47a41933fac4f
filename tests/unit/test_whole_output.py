"""What a command prints arrives whole, whatever interrupts it: containers set PYTHONUNBUFFERED, and Python then drops
what a write that is interrupted has left over."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = """
import click
from bridge.process.lazy import LazyGroup

@click.command()
def much():
    click.echo("x" * 300_000)

@click.group(cls=LazyGroup, lazy={"much": ("__main__:much", "")})
def main():
    pass

main()
"""
FIONREAD = 0x541B
PIPE = 65_536


def test_output_that_is_interrupted_arrives_whole(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script, "much"], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        until_full(process.stdout.fileno())
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        process.send_signal(signal.SIGCONT)
        assert len(process.stdout.read()) == 300_001
    assert process.returncode == 0


def until_full(pipe: int) -> None:
    """Until whoever writes into it must wait."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if int.from_bytes(fcntl.ioctl(pipe, FIONREAD, b"\0" * 4), sys.byteorder) == PIPE:
            return
        time.sleep(0.01)
    raise AssertionError("nothing fills the pipe")
