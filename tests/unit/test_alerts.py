"""deploy/prometheus: the alerts hold what docs/alerts.md promises, and promtool's scenarios show when each fires."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.environment import ROOT
from tests.support.pages import anchors

RULES = ROOT / "deploy/prometheus/pgbridge.rules.yml"
SCENARIOS = sorted((ROOT / "deploy/prometheus/tests").glob("*.yml"))


def alerts() -> dict[str, Any]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def run(promtool: Path, *words: str | Path) -> None:
    done = subprocess.run([promtool, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_sound(promtool: Path) -> None:
    run(promtool, "check", "rules", RULES)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.stem)
def test_alerts_fire_where_they_must_and_nowhere_else(promtool: Path, scenario: Path) -> None:
    run(promtool, "test", "rules", scenario)


def test_a_scenario_shows_each_alert_firing_and_another_shows_it_silent() -> None:
    seen: dict[str, set[bool]] = {name: set() for name in alerts()}
    for file in SCENARIOS:
        for scenario in yaml.safe_load(file.read_text())["tests"]:
            for check in scenario["alert_rule_test"]:
                seen[check["alertname"]].add(bool(check["exp_alerts"]))
    assert {name: fired for name, fired in seen.items() if fired != {True, False}} == {}


@pytest.mark.parametrize("name", alerts())
def test_each_alert_has_a_severity_and_a_runbook_that_exists(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor in anchors(ROOT / page)
    assert anchor == name.lower()


def test_the_page_has_no_section_of_an_alert_that_is_gone() -> None:
    sections = re.findall(r"^### (.+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    assert sections == list(alerts())
