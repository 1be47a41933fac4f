"""deploy/docker/Dockerfile, as far as it can be judged without an engine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

from tests.support.environment import ROOT

DOCKERFILE: Final = ROOT / "deploy" / "docker" / "Dockerfile"
TEXT: Final = DOCKERFILE.read_text()
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.prefix) / "bin" / "hadolint"
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_the_extras_and_the_versions_of_the_debian_package() -> None:
    rules = (ROOT / "deploy" / "debian" / "rules").read_text()
    [extras] = re.findall(r"^EXTRAS := (\S+)$", rules, flags=re.MULTILINE)
    assert f"--constraint requirements.txt '.[{extras}]'" in TEXT
    for option in ("--only-binary :all: --no-binary nkeys",):
        assert option in TEXT
        assert option in rules


def test_both_stages_have_the_oldest_python_which_is_that_of_debian_12_and_of_ci() -> None:
    [version] = re.findall(r"^ARG PYTHON=(\d+\.\d+)\.\d+-slim-bookworm$", TEXT, flags=re.MULTILINE)
    assert f">={version}" == PROJECT["project"]["requires-python"]
    assert re.findall(r"^FROM (\S+)", TEXT, flags=re.MULTILINE) == ["python:${PYTHON}"] * 2


def test_the_build_sees_what_a_wheel_is_made_of_and_nothing_else() -> None:
    first, *rest = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    seen = {line.removeprefix("!") for line in rest if line.startswith("!")}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert seen == {
        *("pyproject.toml", "requirements.txt", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]),
        *(*wheel["packages"], *wheel["force-include"]),
    }
    for name in seen:
        assert (ROOT / name).exists(), name


def test_the_user_is_a_number_and_owns_what_workers_write() -> None:
    [user] = re.findall(r"^USER (.+)$", TEXT, flags=re.MULTILINE)
    assert user == "10001:10001"
    assert "install --directory --owner=10001 --group=10001 /var/lib/pgbridge/invoices" in TEXT


def test_without_words_the_image_runs_the_bridge() -> None:
    assert TEXT.endswith('\nCMD ["pgbridge", "run"]\n')
    assert set(PROJECT["project"]["scripts"]) == {"pgbridge", "pgbridge-worker"}
    assert "ENV PATH=/opt/pgbridge/bin:$PATH" in TEXT
