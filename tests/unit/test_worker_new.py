"""`pgbridge-worker new`: what it writes works at once, and nothing that is there is touched."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bridge.settings import load
from tests.support.environment import environment, make_environment
from workers.new import new_worker


def new(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(new_worker, [*words, "--folder", str(folder)], obj=None)


def refused(folder: Path, *words: str) -> str:
    """Why it wrote nothing."""
    before = contents(folder)
    done = new(folder, *words)
    assert done.exit_code == 2, done.output
    assert contents(folder) == before
    return " ".join(done.output.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_it_writes_passes_its_test_runs_and_has_types(tmp_path: Path) -> None:
    programs = make_environment(tmp_path / "venv")
    project = tmp_path / "project"
    project.mkdir()

    def shell(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=project, env=environment(programs), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        return done.stdout

    told = shell("pgbridge-worker new stock-keeper")
    assert told.splitlines()[:3] == ["wrote stock_keeper.py", "wrote test_stock_keeper.py", "wrote bridge.toml"]
    assert "2 passed" in shell("pytest")
    [trial] = [line for line in told.splitlines() if " try " in line]
    assert '"id": 7' in shell(trial)
    assert "stock_keeper:handle" in shell("pgbridge-worker list")
    shell("pgbridge-worker new mail --topic shop.mail.wanted")
    assert "4 passed" in shell("pytest")
    checked = [sys.executable, "-P", "-m", "mypy", "--strict", "--python-executable", str(programs / "python"), "."]
    subprocess.run(checked, cwd=project, check=True, timeout=120)
    for linted in (
        ["check", "--isolated", "--select", "E,F,I,B,UP,N,RET,TRY,S", "--ignore", "S101"],
        ["format", "--check", "--isolated"],
    ):
        subprocess.run([sys.executable, "-m", "ruff", *linted, "--line-length", "120", "."], cwd=project, check=True)


def test_settings_that_are_there_get_the_worker_and_keep_every_byte(tmp_path: Path) -> None:
    text = 'name = "a"\n[sinks.one]\ntype = "memory"\n[sinks.two]\ntype = "memory"\n[workers.old]\nhandler = "a:b"'
    (tmp_path / "bridge.toml").write_text(text)  # and no end of line
    done = new(tmp_path, "stock")
    assert done.exit_code == 0, done.output
    assert f"added to {tmp_path / 'bridge.toml'}" in done.output
    assert (tmp_path / "bridge.toml").read_text().startswith(text)
    settings = load(tmp_path / "bridge.toml", {})
    assert sorted(settings.workers) == ["old", "stock"]
    assert settings.workers["stock"].path == [tmp_path]
    assert settings.sink_of("stock") == "one"


@pytest.mark.parametrize("there", ["stock.py", "test_stock.py", "stock/__init__.py"])
def test_a_file_that_is_there_is_never_replaced(tmp_path: Path, there: str) -> None:
    file = tmp_path / there
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    place = file.parent if file.name == "__init__.py" else file
    assert f"{place} exists already; nothing was written" in refused(tmp_path, "stock")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[workers.stock]\nhandler = "a:b"\n', "workers.stock is there already"),
        ("workers = { old = { handler = 'a:b' } }\n", "takes no table [workers.stock] at its end"),
        ("name = \n", "is not TOML"),
    ],
)
def test_settings_that_cannot_take_the_worker_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bridge.toml").write_text(text)
    told = refused(tmp_path, "stock")
    assert f"{tmp_path / 'bridge.toml'}: " in told
    assert said in told


@pytest.mark.parametrize("name", ["Stock", "1st", "", "a b", "a.b", "x" * 64, "stock\n", "../x"])
def test_a_name_that_the_settings_would_refuse_is_refused(tmp_path: Path, name: str) -> None:
    assert "is no name of a worker" in refused(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dsn", "workers.dsn is the workers' login"),
        ("email", "Python knows another 'email', which email.py would hide; try email-worker"),
        ("class", "Python knows another 'class'"),
        ("psycopg", "Python knows another 'psycopg'"),
        ("workers", "Python knows another 'workers'"),
    ],
)
def test_a_name_whose_module_would_be_in_the_way_of_others_is_refused(tmp_path: Path, name: str, said: str) -> None:
    assert said in refused(tmp_path, name)


@pytest.mark.parametrize("other", ["workers/__init__.py", "bridge.py"])
def test_a_folder_with_a_package_named_as_ours_is_refused(tmp_path: Path, other: str) -> None:
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).touch()
    assert "stands in the way of pgbridge's own package" in refused(tmp_path, "stock")


@pytest.mark.parametrize("topic", ["shop.#", "*", "", "a" * 256, 'a"b', "a\nb"])
def test_a_topic_that_no_event_has_is_refused(tmp_path: Path, topic: str) -> None:
    assert "--topic: " in refused(tmp_path, "stock", "--topic", topic)


@pytest.mark.parametrize(
    ("topic", "model"),
    [
        ("shop.order.placed", "OrderPlaced"),
        ("stock_level", "StockLevel"),
        ("Stock Level", "StockLevel"),
        ("2.3", "Payload"),
        ("event", "Payload"),
        ("é", "Payload"),
    ],
)
def test_the_model_is_named_for_the_event(tmp_path: Path, topic: str, model: str) -> None:
    assert new(tmp_path, "stock", "--topic", topic).exit_code == 0
    module = ast.parse((tmp_path / "stock.py").read_text())
    assert [node.name for node in module.body if isinstance(node, ast.ClassDef)] == [model]
    assert load(tmp_path / "bridge.toml", {}).workers["stock"].handler == "stock:handle"
    runpy.run_path(str(tmp_path / "stock.py"))


def test_what_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bridge.toml").symlink_to(tmp_path / "absent" / "bridge.toml")
    done = new(tmp_path, "stock")
    assert done.exit_code == 1, done.output
    assert "cannot be written: " in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["bridge.toml"]
