"""The source archive and the wheel: built, installed by pip in clean environments, and used from outside of the tree.

Dependencies are the newest that pip finds, as for whoever installs it. It takes an index of packages and some minutes:
`make dist-test`.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import pytest

import bridge.cli
import workers.cli
from tests.packages.building import copy_sources
from tests.support.environment import environment
from tests.support.tutorial import followed

pytestmark = [pytest.mark.packages, pytest.mark.timeout(1800)]

EXTRAS: Final = "nats,pubsub,invoices,objectstore,payments,webhooks,otel,console,demo"

TEST_TOOLS: Final = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")

NEEDS_EXTRA: Final = {
    "deliver": "webhooks",
    "listen": "payments",
    "reconcile": "payments",
    "webhooks": "webhooks",
}
"""Commands that are nothing without an extra, and name it."""

IMPORT_ALL: Final = """
import importlib, pkgutil, bridge, workers
for package in (bridge, workers):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print(bridge.__file__)
"""


@dataclass(frozen=True)
class Dist:
    """What `make dist` makes."""

    archive: Path
    wheel: Path


@dataclass(frozen=True)
class Installed:
    """A virtual environment, and a folder outside of the tree to work in."""

    programs: Path
    home: Path

    def run(self, *command: str, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs one of its programs."""
        return subprocess.run(
            [str(self.programs / command[0]), *command[1:]],
            cwd=self.home,
            env={**environment(self.programs), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def prints(self, *command: str, timeout: float = 600, **variables: str) -> str:
        """What it prints. Raises AssertionError with all of it where it fails."""
        done = self.run(*command, timeout=timeout, **variables)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def dist(server_folder: Path) -> Dist:
    """The wheel is built from the archive, so that the archive has all it takes."""
    project = server_folder / "project"
    copy_sources(project)
    built = server_folder / "dist"
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(built), str(project)], check=True)
    [archive], [wheel] = built.glob("*.tar.gz"), built.glob("*.whl")
    return Dist(archive, wheel)


def make(folder: Path, *packages: str) -> Installed:
    """A clean environment with these packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    installed = Installed(folder / "venv" / "bin", folder / "home")
    installed.home.mkdir()
    installed.prints("pip", "install", "-qq", "--disable-pip-version-check", *packages)
    return installed


@pytest.fixture(scope="module")
def bare(dist: Dist, server_folder: Path) -> Installed:
    """The wheel without extras."""
    return make(server_folder / "bare", str(dist.wheel))


@pytest.fixture(scope="module")
def whole(dist: Dist, server_folder: Path) -> Installed:
    """The wheel with every extra of its users."""
    return make(server_folder / "whole", f"{dist.wheel}[{EXTRAS}]", *TEST_TOOLS)


def commands(group: click.Command, *above: str) -> list[tuple[str, ...]]:
    """The words of each command of a group, and of the groups in it."""
    if not isinstance(group, click.Group):
        return [above]
    context = click.Context(group)
    found = [above]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += commands(command, *above, name)
    return found


def test_the_archive_has_what_the_repository_has(dist: Dist, server_folder: Path) -> None:
    project = server_folder / "project"
    names = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    with tarfile.open(dist.archive) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed - {"PKG-INFO"} == names


@pytest.mark.parametrize(
    ("program", "group"),
    [("pgbridge", bridge.cli.main), ("pgbridge-worker", workers.cli.main)],
    ids=["bridge", "worker"],
)
def test_without_extras_every_command_helps(bare: Installed, program: str, group: click.Command) -> None:
    version = bare.prints("python", "-c", "import bridge; print(bridge.__version__)").strip()
    assert version == bridge.__version__
    assert version in bare.prints(program, "--version")
    for words in commands(group):
        done = bare.run(program, *words, "--help")
        if words and words[0] in NEEDS_EXTRA:
            assert f"pip install 'pgbridge[{NEEDS_EXTRA[words[0]]}]'" in done.stdout, words
        else:
            assert (done.returncode, done.stdout[:6]) == (0, "Usage:"), f"{words} printed:\n{done.stdout}"


def test_without_extras_a_bridge_needs_nothing_else(bare: Installed, database: str) -> None:
    bare.prints("pgbridge", "migrate", "--dsn", database)
    settings = bare.home / "bridge.toml"
    settings.write_text(f'name = "shop"\n[postgres]\ndsn = "{database}"\n[sinks.events]\ntype = "memory"\n')
    event = bare.prints("pgbridge", "emit", "shop.order.placed", '{"id": 1}').strip()
    assert "shop.order.placed" in bare.prints("pgbridge", "where", event)
    settings.write_text(settings.read_text().replace('"memory"', '"nats"\nurl = "nats://127.0.0.1:1"'))
    done = bare.run("pgbridge", "check")
    assert done.returncode == 78
    assert "pgbridge[nats]" in done.stdout


def test_with_every_extra_every_module_is_importable_and_no_requirement_is_broken(whole: Installed) -> None:
    assert "No broken requirements" in whole.prints("pip", "check")
    assert str(whole.programs.parent) in whole.prints("python", "-c", IMPORT_ALL)


@pytest.mark.parametrize("broker", ["embedded", "rabbitmq", "pubsub"])
def test_the_demo_loses_nothing(whole: Installed, broker: str) -> None:
    printed = whole.prints("pgbridge", "demo", "--broker", broker, "--orders", "40", "--kill", "--json")
    [told] = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert told["lost"] == 0, printed


def test_the_tutorial_leads_to_a_worker(dist: Dist, server_folder: Path) -> None:
    installs = f'{sys.executable} -m pip --python "$VIRTUAL_ENV/bin/python" install -qqq "{dist.wheel}[demo]" pytest'
    with followed(server_folder / "tutorial-of-the-wheel", installs=installs) as reader:
        pass
    assert reader.written == ["bridge.toml", "shop.sql"]


def test_sinks_and_queues_of_every_broker_keep_their_contract(whole: Installed, server_folder: Path) -> None:
    tests = server_folder / "tests-alone"
    copy_sources(tests)
    for package in ("bridge", "workers"):
        shutil.rmtree(tests / package)
    printed = whole.prints(
        "pytest",
        "-q",
        "-p",
        "pytest_asyncio.plugin",
        "-p",
        "pytest_timeout",
        f"--rootdir={tests}",
        f"{tests}/tests/contract",
        timeout=1500,
    )
    assert " passed" in printed.splitlines()[-1]
