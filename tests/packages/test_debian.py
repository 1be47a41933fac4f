"""The Debian package, in a Debian 12 and a Debian 13: built, installed, upgraded, removed and purged.

It takes root, debootstrap, systemd-nspawn, mirrors of Debian and PyPI, and some minutes: `make deb-test`.
"""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

import bridge.cli
import workers.cli
from tests.packages.building import NEEDS, build, copy_sources
from tests.support.debian import Folder, Machine, kept
from tests.support.environment import ROOT

pytestmark = NEEDS

SETTINGS: Final = """\
name = "shop"

[postgres]
dsn = "postgresql:///shop?host=/run/postgresql"

[sinks.events]
type = "memory"

[[routes]]
topic = "#"
sink = "events"

[workers.invoices]
handler = "workers.invoices:render"
reply = "shop.invoice_rendered"
options = { path = "/var/lib/pgbridge/invoices" }
"""

DATABASE: Final = """\
runuser -u postgres -- createuser pgbridge
runuser -u postgres -- createdb shop
runuser -u postgres -- pgbridge migrate --dsn 'postgresql:///shop?host=/run/postgresql'
runuser -u postgres -- psql -q -v ON_ERROR_STOP=1 -d shop -f /usr/share/doc/pgbridge/examples/shop.sql
runuser -u postgres -- psql -q -d shop -c 'grant bridge_relay, bridge_worker to pgbridge'
"""

UNITS: Final = ("pgbridge.service", "pgbridge-worker@invoices.service")


@dataclass(frozen=True)
class Packages:
    """Two packages of this tree, made in one release."""

    release: str
    builder: Folder
    old: Path
    new: Path


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def packages(request: pytest.FixtureRequest) -> Packages:
    release: str = request.param
    builder, (old, new) = build(release, ("1", "2"))
    return Packages(release, builder, old, new)


@contextmanager
def machine_of(release: str) -> Iterator[Machine]:
    """One with PostgreSQL and what people have who read manuals and complete commands."""
    folder = kept(release, "machine", ["bash-completion", "man-db", "postgresql"])
    with Machine(folder) as machine:
        # The network is the host's.
        machine.do("""
            for folder in /etc/postgresql/*/main/conf.d; do echo "listen_addresses = ''" > $folder/no-network.conf; done
            systemctl restart postgresql
        """)
        yield machine


def install(machine: Machine, package: Path) -> str:
    shutil.copy(package, machine.path / "srv")
    return machine.do(f"apt-get install -q -y --no-install-recommends /srv/{package.name}")


@pytest.fixture(scope="module")
def machine(packages: Packages) -> Iterator[Machine]:
    """One where the package is installed and nothing is configured."""
    with machine_of(packages.release) as machine:
        install(machine, packages.old)
        yield machine


def test_lintian_finds_no_error(packages: Packages) -> None:
    file = f"/{packages.old.relative_to(packages.builder.path)}"
    print(packages.builder.run("lintian", "--fail-on", "error", file, user="builder"))


def test_it_depends_on_the_python_that_it_was_built_with(packages: Packages) -> None:
    file = f"/{packages.old.relative_to(packages.builder.path)}"
    depends = packages.builder.run("dpkg-deb", "--field", file, "Depends")
    minor = {"bookworm": 11, "trixie": 13}[packages.release]
    assert f"python3 (>= 3.{minor}), python3 (<< 3.{minor + 1})" in depends


def test_without_build_dependencies_it_says_which(machine: Machine) -> None:
    copy_sources(machine.path / "srv/pgbridge")
    done = machine.run("/srv/pgbridge/deploy/build-deb")
    assert done.returncode == 1
    assert "apt-get install build-essential debhelper python3-venv" in done.stdout


def test_commands_run_without_settings_and_say_what_they_need(machine: Machine) -> None:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "bridge" / "__init__.py").read_text())
    assert version is not None
    for program in ("pgbridge", "pgbridge-worker"):
        assert f"version {version[1]}\n" in machine.do(f"{program} --version")
    done = machine.run("pgbridge", "check")
    assert (done.returncode, done.stdout) == (
        78,
        "pgbridge: no settings: neither bridge.toml nor /etc/pgbridge/bridge.toml exists. "
        "Name the file with --config or PGBRIDGE_CONFIG\n",
    )
    done = machine.run("pgbridge", "demo")
    assert done.returncode != 0
    assert "pip install 'pgbridge[demo]'" in done.stdout


def test_every_extra_is_there_and_everything_is_compiled(machine: Machine) -> None:
    modules = "cryptography, google.cloud.pubsub_v1, grpc, httpcore, nats, obstore, psycopg, stripe, typst, uvloop"
    machine.do(f"/opt/pgbridge/bin/python3 -c 'import {modules}'")
    missing = machine.do("""
        find /opt/pgbridge -name '*.py' -path '*/bridge/*' | while read -r file; do
            compiled=$(dirname "$file")/__pycache__/$(basename "$file" .py).cpython-*.pyc
            [ -e $compiled ] || echo "$file"
        done
    """)
    assert missing == ""
    # Root may write there, and has nothing to write.
    machine.do("touch /srv/now; pgbridge check --help; pgbridge-worker run --help")
    assert machine.do("find /opt/pgbridge -newer /srv/now") == ""


def test_nothing_is_started_and_nothing_enabled(machine: Machine) -> None:
    for unit in UNITS:
        assert machine.run("systemctl", "is-active", unit).stdout == "inactive\n"
        assert machine.run("systemctl", "is-enabled", unit).stdout == "disabled\n"
    assert machine.do("systemctl list-units --failed --no-legend --plain 'pgbridge*'") == ""


def test_a_unit_without_settings_says_so(machine: Machine) -> None:
    machine.run("systemctl", "start", "pgbridge")
    deadline = time.monotonic() + 30
    while machine.run("systemctl", "is-failed", "pgbridge").returncode:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status = machine.run("systemctl", "status", "--no-pager", "--lines=20", "pgbridge").stdout
    assert "status=78" in status
    assert "pgbridge: /etc/pgbridge/bridge.toml: cannot be read: No such file or directory" in status
    machine.do("systemctl reset-failed pgbridge")


def test_folders_and_their_rights(machine: Machine) -> None:
    folders = "/etc/pgbridge /etc/pgbridge/credentials /etc/pgbridge/credentials/{bridge,console,workers}"
    assert machine.do(f"stat -c '%a %U %n' {folders}").splitlines() == [
        "755 root /etc/pgbridge",
        "700 root /etc/pgbridge/credentials",
        "700 root /etc/pgbridge/credentials/bridge",
        "700 root /etc/pgbridge/credentials/console",
        "700 root /etc/pgbridge/credentials/workers",
    ]
    assert machine.do("getent passwd pgbridge").endswith(":pgbridge daemons:/var/lib/pgbridge:/usr/sbin/nologin\n")


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("pgbridge", "pgbridge-status(1)"),
        ("pgbridge-worker", "pgbridge-worker-try(1)"),
        ("pgbridge dead", "pgbridge dead replay"),
        ("pgbridge-worker run", "pgbridge-worker run [OPTIONS] NAME"),
        ("bridge.toml", "prune_interval (duration; 1m)"),
    ],
)
def test_manual_pages(machine: Machine, page: str, shown: str) -> None:
    done = machine.do(f"MANWIDTH=100 man --warnings {page} 2>&1")
    assert shown in re.sub(r".\x08", "", done)
    assert "troff:" not in done


def test_every_manual_page_is_known_by_its_name(machine: Machine) -> None:
    machine.do("mandb --quiet")
    listed = "cd /usr/share/man; ls man1/pgbridge* man5/bridge.toml* | sed 's|.*/||; s|[.][15]\\(.gz\\)\\?$||'"
    names = machine.do(listed).split()
    assert len(names) == len(bridge.cli.COMMANDS) + len(workers.cli.COMMANDS) + 3
    described = machine.do(f"whatis --long {' '.join(names)}").splitlines()
    assert {line.split()[0] for line in described} == set(names)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [("pgbridge topo", "pgbridge topology"), ("pgbridge-worker rele", "pgbridge-worker release"),
     ("pgbridge dead disc", "pgbridge dead discard"), ("pgbridge status --js", "pgbridge status --json")],
)  # fmt: skip
def test_bash_completes(machine: Machine, typed: str, shown: str) -> None:
    controller, terminal = pty.openpty()
    words = machine.enter("bash", "--norc", "-i")
    shell = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    try:
        os.write(controller, b". /usr/share/bash-completion/bash_completion; PS1='>'; echo rea''dy\n")
        _read_until(controller, "ready", 20)
        began = time.monotonic()
        os.write(controller, f"{typed}\t".encode())
        _read_until(controller, shown, 20)
        print(f"{shown}: {time.monotonic() - began:.2f} s")
    finally:
        shell.kill()
        shell.wait(20)
        os.close(controller)


def _read_until(terminal: int, wanted: str, limit: float) -> None:
    seen = ""
    deadline = time.monotonic() + limit
    while wanted not in seen:
        readable, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"{wanted!r} is not in {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")


def test_from_install_to_purge(packages: Packages) -> None:
    with machine_of(packages.release) as machine:
        before = files(machine)
        install(machine, packages.old)
        machine.do(DATABASE)
        (machine.path / "etc/pgbridge/bridge.toml").write_text(SETTINGS)
        (machine.path / "etc/pgbridge/credentials/bridge/postgres.dsn").write_text(
            "postgresql://pgbridge@/shop?host=/run/postgresql\n"
        )
        machine.do(f"systemctl enable --now {' '.join(UNITS)}")
        assert "leading" in machine.do("systemctl status --no-pager pgbridge")
        first = running(machine)

        install(machine, packages.new)
        second = running(machine)
        assert set(first) == set(second) == set(UNITS)
        assert not set(first.values()) & set(second.values()), "they run on the new package"

        (machine.path / "var/lib/pgbridge/invoices/2026-0001.pdf").write_text("%PDF")
        (machine.path / "etc/pgbridge/handlers.py").write_text("")
        machine.do("apt-get remove -q -y pgbridge")
        assert running(machine) == {}
        assert not (machine.path / "opt/pgbridge").exists()
        assert machine.do("cat /etc/pgbridge/bridge.toml") == SETTINGS
        assert machine.do("ls /etc/pgbridge/credentials/bridge") == "postgres.dsn\n"
        machine.do("getent passwd pgbridge")

        install(machine, packages.new)
        machine.do("systemctl start pgbridge.target")
        assert set(running(machine)) == set(UNITS), "they are still enabled"

        printed = machine.do("apt-get purge --autoremove -q -y pgbridge")
        assert running(machine) == {}
        assert "/etc/pgbridge is not empty, and stays" in printed
        assert "/var/lib/pgbridge is not empty, and stays" in printed
        assert files(machine) - before == {
            "/etc/pgbridge",
            "/etc/pgbridge/handlers.py",
            "/var/lib/pgbridge",
            "/var/lib/pgbridge/invoices",
            "/var/lib/pgbridge/invoices/2026-0001.pdf",
        }
        assert before - files(machine) == set()


def test_a_virtual_environment_made_by_hand_is_not_written_over(packages: Packages) -> None:
    with machine_of(packages.release) as machine:
        shutil.copy(packages.old, machine.path / "srv")
        machine.do("mkdir /opt/pgbridge; echo mine > /opt/pgbridge/pyvenv.cfg")
        done = machine.run("apt-get", "install", "-q", "-y", f"/srv/{packages.old.name}")
        assert done.returncode != 0
        assert "/opt/pgbridge holds a virtual environment that is not of this package" in done.stdout
        assert machine.do("cat /opt/pgbridge/pyvenv.cfg") == "mine\n"


def running(machine: Machine) -> dict[str, int]:
    """The main process of each of our units that runs."""
    printed = machine.do("systemctl list-units --plain --no-legend --state=active 'pgbridge*.service' | cut -d' ' -f1")
    return {unit: int(machine.do(f"systemctl show -P MainPID {unit}")) for unit in printed.split()}


def files(machine: Machine) -> set[str]:
    """All there are, but for those in which others keep their own accounts."""
    others = ("/var/cache", "/var/lib/apt", "/var/lib/dpkg", "/var/lib/postgresql", "/var/log", "/srv")
    pruned = " -o ".join(f"-path {folder}" for folder in others)
    return set(machine.do(f"find / -xdev \\( {pruned} \\) -prune -o -print").splitlines())
