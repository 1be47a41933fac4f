"""docs/versions.md names the versions that the tests run on."""

import re
import tomllib

import pytest

from bridge.postgres.connection import OLDEST_POSTGRES
from tests.support.environment import ROOT

PAGE = (ROOT / "docs" / "versions.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    "package", ["psycopg", "aio-pika", "aiormq", "nats-py", "google-cloud-pubsub", "pydantic", "uvloop"]
)
def test_packages_ran_in_the_versions_that_are_installed(package: str) -> None:
    pin = re.search(rf"^{package}==(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert re.search(rf"\b{package} {re.escape(pin[1])}[ ,.]", PAGE)


def test_each_postgresql_that_a_command_tries_and_the_oldest_that_is_taken_are_named() -> None:
    offered = re.findall(r"^  (\d+)\) package=", (ROOT / "deploy" / "postgres-programs").read_text(), re.MULTILINE)
    [tried] = re.findall(r"^\| PostgreSQL \| (\d+) or newer \| (.*) \|$", PAGE, re.MULTILINE)
    assert tried == (str(OLDEST_POSTGRES), ", ".join([*offered, "18"]))


def test_pythons_that_ran_are_those_that_the_package_names() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"| Python | {oldest} or newer | {', '.join(named)} |" in PAGE
