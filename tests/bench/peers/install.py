"""Installs the peers' packages into build/peers/: a venv and a node_modules, never into this project's venv."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bench.rounds import say

FOLDER = Path("build/peers").resolve()

PYTHON_PACKAGES = (
    "faststream-outbox[asyncpg]==0.19.0",
    "faststream[rabbit]==0.7.8",
    "psycopg[binary]==3.3.9",
    "psycopg-pool==3.3.3",
    "aio-pika==10.2.1",
    "uvloop==0.23.0",
)
NODE_PACKAGES = ("pg@8.23.1", "amqplib@2.3.1")


def python() -> Path:
    """The Python of the peers' venv."""
    folder = FOLDER / "venv"
    _once(folder, PYTHON_PACKAGES, _make_venv)
    return folder / "bin" / "python"


def node_modules() -> Path:
    """A node_modules folder, for NODE_PATH. Raises RuntimeError when Node.js is not installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise RuntimeError("Node.js is not installed: apt-get install nodejs npm")
    folder = FOLDER / "node"
    _once(folder, NODE_PACKAGES, _make_node)
    return folder / "node_modules"


def _make_venv(folder: Path) -> list[list[str]]:
    return [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", *PYTHON_PACKAGES],
    ]


def _make_node(folder: Path) -> list[list[str]]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return [["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--silent", *NODE_PACKAGES]]


def _once(folder: Path, packages: tuple[str, ...], commands: Callable[[Path], list[list[str]]]) -> None:
    """Runs the commands unless the folder holds these very packages already."""
    done = folder.with_suffix(".json")
    if done.exists() and json.loads(done.read_text()) == list(packages):
        return
    say(f"  installing {', '.join(packages)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for command in commands(folder):
        subprocess.run(command, check=True, timeout=600, stdin=subprocess.DEVNULL)
    done.write_text(json.dumps(packages))
