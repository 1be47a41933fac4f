"""Projects that have packages `workers` or `bridge` of their own: each command says so in one sentence."""

import subprocess
from pathlib import Path

import pytest

from tests.support.environment import environment, make_environment

SETTINGS = """
name = "shop"
[sinks.events]
type = "memory"
[workers.stock]
handler = "stock:handle"
path = "."
"""

STOCK = """
from workers import handler

@handler("shop.order.placed")
async def handle(event): ...
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "bridge.toml").write_text(SETTINGS)
    (tmp_path / "stock.py").write_text(STOCK)
    return tmp_path


def said(programs: Path, project: Path, *command: str, **variables: str) -> str:
    """The one line on standard error of a command that must end with 78."""
    done = subprocess.run(
        command,
        cwd=project,
        env={**environment(programs), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    return line


COMMANDS = (
    ("pgbridge-worker", "list"),
    ("pgbridge-worker", "run", "stock"),
    ("pgbridge-worker", "try", "stock", "/dev/null"),
    ("pgbridge", "topology"),
    ("python", "-m", "workers.cli", "list"),
    ("python", "-m", "bridge", "topology"),
)


@pytest.mark.parametrize(
    ("package", "command"), [*(("workers", command) for command in COMMANDS), ("bridge", COMMANDS[0])]
)
def test_a_handler_in_a_package_named_as_ours_cannot_be_imported(
    programs: Path, project: Path, package: str, command: tuple[str, ...]
) -> None:
    (project / package).mkdir()
    # Without __init__.py, so that Python finds ours even from the current folder.
    (project / package / "stock.py").write_text(STOCK)
    line = said(programs, project, *command, PGBRIDGE_WORKERS__STOCK__HANDLER=f"{package}.stock:handle")
    assert line.endswith(
        f"workers.stock.handler: cannot import {package}.stock: `{package}` is pgbridge's own package, "
        f"so {project / package} cannot be imported under this name. Rename it"
    )


@pytest.mark.parametrize("package", ["workers", "bridge"])
def test_a_handler_that_imports_from_a_package_named_as_ours_is_told_the_same(
    programs: Path, project: Path, package: str
) -> None:
    (project / package).mkdir()
    for name in ("__init__", "db"):
        (project / package / f"{name}.py").touch()
    (project / "stock.py").write_text(f"import {package}.db")
    line = said(programs, project, "pgbridge-worker", "list")
    assert f"cannot import stock: `{package}` is pgbridge's own package, so {project / package} cannot" in line


def test_a_name_of_ours_that_nobody_has_is_said_to_be_ours(programs: Path, project: Path) -> None:
    line = said(programs, project, "pgbridge-worker", "list", PGBRIDGE_WORKERS__STOCK__HANDLER="workers.stock:handle")
    assert line.endswith(
        "No module named 'workers.stock'. `workers` is pgbridge's own package; yours needs another name"
    )


@pytest.mark.parametrize("command", [("pgbridge", "status"), ("pgbridge-worker", "list")])
@pytest.mark.parametrize("other", ["workers/__init__.py", "workers.py", "bridge/__init__.py", "bridge.py"])
def test_a_package_that_python_finds_before_ours_is_named(
    programs: Path, project: Path, other: str, command: tuple[str, ...]
) -> None:
    place = project / other
    place.parent.mkdir(exist_ok=True)
    place.touch()
    place = place.parent if place.stem == "__init__" else place
    line = said(programs, project, *command, PYTHONPATH=str(project))
    assert line == (
        f"{command[0]}: {place} stands in the way of pgbridge's own package `{place.stem}`: rename it, "
        "or take its folder off PYTHONPATH"
    )


@pytest.mark.parametrize(
    ("other", "module"),
    [
        ("bridge.py", "workers"),
        ("bridge.py", "workers.cli"),
        ("workers.py", "bridge"),
        ("workers.py", "bridge.cli"),
    ],
)
def test_so_is_one_in_the_current_folder_that_python_m_finds(
    programs: Path, project: Path, other: str, module: str
) -> None:
    (project / other).touch()
    line = said(programs, project, "python", "-m", module, "list")
    program = "pgbridge" if module.startswith("bridge") else "pgbridge-worker"
    assert line.startswith(f"{program}: {project / other} stands in the way of pgbridge's own package `{other[:-3]}`")


def test_a_program_that_imports_workers_gets_the_sentence_as_an_error(programs: Path, project: Path) -> None:
    (project / "bridge.py").touch()
    done = subprocess.run(
        ["python", "-c", "import workers"],
        cwd=project,
        env=environment(programs),
        capture_output=True,
        text=True,
        check=False,
    )
    sentence = f"{project / 'bridge.py'} stands in the way of pgbridge's own package `bridge`: rename it"
    assert done.stderr.splitlines()[-1] == f"ImportError: {sentence}"
