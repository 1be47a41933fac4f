"""Runs a peer's program: to its end, for its result; or beside what watches it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.bench.peers import install

HERE = Path(__file__).parent


def own(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> float:
    """A peer that needs only this project's packages: messages a second."""
    return _rate([sys.executable, "-m", f"tests.bench.peers.{module}", *arguments], environment or {})


def foreign(script: str, *arguments: str) -> float:
    """A peer in the peers' own venv: messages a second."""
    return _rate([str(install.python()), str(HERE / script), *arguments], {})


def node(script: str, *arguments: str) -> float:
    """A peer on Node.js: messages a second."""
    return _rate(["node", str(HERE / script), *arguments], {"NODE_PATH": str(install.node_modules())})


@contextmanager
def running(module: str, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A peer in the peers' own venv that works until SIGTERM, and writes what goes wrong to `log`.

    Raises RuntimeError when it does not end well.
    """
    command = [str(install.python()), "-m", f"tests.bench.peers.{module}", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield process
        process.terminate()
        code = process.wait(30)
        if code != 0:
            raise RuntimeError(f"{module} ended with {code}: {log.read_text(errors='replace')[-1500:].strip()}")
    finally:
        process.kill()
        process.wait()


def _rate(command: list[str], environment: Mapping[str, str]) -> float:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[1]} {command[2]} ended with {done.returncode}: {done.stderr[-1500:].strip()}")
    result = json.loads(done.stdout.splitlines()[-1])
    return float(result["messages"] / result["seconds"])
