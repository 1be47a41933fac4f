"""The units in deploy/: hardened alike, and as far as systemd can say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SERVICES = sorted(DEPLOY.glob("*.service"))
MOST_EXPOSURE = 2.0
OWN = ("StateDirectory=", "StateDirectoryMode=")
"""What a unit may have more than the others."""


def hardening(unit: Path) -> list[str]:
    lines = unit.read_text().partition("NoNewPrivileges=yes")[2].partition("[Install]")[0].splitlines()
    return [line for line in lines if line and not line.startswith(("#", *OWN))]


def test_every_unit_is_hardened_as_the_bridges() -> None:
    assert len(SERVICES) == 6
    for unit in SERVICES:
        assert hardening(unit) == hardening(DEPLOY / "pgbridge.service"), unit.name


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_systemd_finds_a_unit_little_exposed(unit: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    done = subprocess.run(
        [program, "security", "--offline=true", "--no-pager", str(unit)], capture_output=True, text=True, check=False
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= MOST_EXPOSURE, done.stdout


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_unit_is_started_again_unless_something_of_ours_must_change(unit: Path) -> None:
    text = unit.read_text()
    if "Type=oneshot" in text:
        return
    assert "StartLimitIntervalSec=0\n" in text.partition("[Service]")[0]
    for line in ("Restart=always", "RestartSec=5", "RestartPreventExitStatus=78 2", "WatchdogSec=30", "Type=notify"):
        assert f"\n{line}\n" in text, line
