"""Whose name stands in the audit."""

import os
import socket
import subprocess
import sys

import pytest

from bridge.process.person import current_person
from tests.support.environment import ROOT


def test_a_person_is_a_user_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "anna")
    assert current_person() == f"anna@{socket.gethostname()}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become a user that has no name")
def test_a_user_without_a_name_is_a_number() -> None:
    code = "import os, pwd; from bridge.process.person import current_person; os.setuid(54321); print(current_person())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert done.stdout == f"54321@{socket.gethostname()}\n", done.stderr
