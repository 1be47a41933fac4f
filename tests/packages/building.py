"""Packages of this tree, built in a folder of a release."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.debian import Folder, kept, pip_settings
from tests.support.environment import ROOT

NEEDS: Final[list[Any]] = [
    pytest.mark.packages,
    pytest.mark.timeout(3600),  # the first test of a release makes its folder and builds
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("debootstrap", "systemd-nspawn"))),
        reason="needs root, debootstrap and systemd-nspawn: apt install debootstrap systemd-container",
    ),
]


def build(release: str, revisions: Sequence[str]) -> tuple[Folder, list[Path]]:
    """The folder in which they were built, and a package for each revision."""
    builder = kept(release, "build", ["build-essential", "debhelper", "python3-venv", "lintian"])
    home = builder.path / "home" / "builder"
    if not home.exists():
        builder.run("useradd", "--create-home", "builder")
    project = home / "pgbridge"
    shutil.rmtree(project, ignore_errors=True)
    copy_sources(project)
    builder.run("chown", "-R", "builder:", "/home/builder")
    built = []
    for revision in revisions:
        # What is packed well takes minutes, and is thrown away.
        settings = {"REVISION": revision, "DPKG_DEB_COMPRESSOR_LEVEL": "1", **pip_settings()}
        printed = builder.run("make", "-C", "/home/builder/pgbridge", "deb", user="builder", environ=settings)
        built.append(project / re.findall(r"^build/pgbridge_.*\.deb$", printed, flags=re.MULTILINE)[-1])
    return builder, built


def copy_sources(target: Path) -> None:
    """What git knows of this tree, or would."""
    listed = ("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
