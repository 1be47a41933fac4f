"""`--help` answers at once, and what it says of a command is what the command says of itself."""

import os
import subprocess
import sys

import click
import pytest

import bridge.cli
import workers.cli
from bridge.process.lazy import LazyGroup

GROUPS = {"bridge.cli": bridge.cli, "workers.cli": workers.cli}
HEAVY = {"bridge.cli": ("pydantic", "psycopg", "rich", "structlog"), "workers.cli": ("psycopg", "rich", "structlog")}
"""Handlers' options are pydantic models, so the package `workers` itself loads it."""


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, group in GROUPS.items() for name in group.COMMANDS]
)
def test_the_line_of_a_command_is_the_first_sentence_of_its_own_help(module: str, name: str) -> None:
    group = GROUPS[module].main
    assert isinstance(group, LazyGroup)
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert command.get_short_help_str(limit=300) == GROUPS[module].COMMANDS[name][1]


def test_the_commands_are_sorted() -> None:
    for group in GROUPS.values():
        assert list(group.COMMANDS) == sorted(group.COMMANDS)


@pytest.mark.parametrize("module", GROUPS)
def test_help_loads_nothing_heavy(module: str) -> None:
    program = (
        f"import sys, {module}\n"
        f"{module}.main(['--help'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY[module]} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", GROUPS)
def test_completing_a_name_loads_nothing_heavy(module: str) -> None:
    program = (
        f"import sys, {module}\n"
        "try:\n"
        f"    {module}.main(prog_name='p')\n"
        "finally:\n"
        f"    print([name for name in {HEAVY[module]} if name in sys.modules])\n"
    )
    name = list(GROUPS[module].COMMANDS)[-1]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "_P_COMPLETE": "bash_complete", "COMP_WORDS": f"p {name[:-1]}", "COMP_CWORD": "1"},
    )
    assert done.stdout.splitlines() == [f"plain,{name}", "[]"]
