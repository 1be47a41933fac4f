"""Releases of Debian in folders: made by debootstrap, entered by systemd-nspawn. All of it needs root and a mirror.

The folders are kept below $PGBRIDGE_DEBIAN_FOLDERS, by default build/folders, so that a second run is quick; remove
them to have newer packages in them. What runs in one shares the host's network.
"""

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.support.environment import ROOT

KEPT: Final = Path(os.environ.get("PGBRIDGE_DEBIAN_FOLDERS", ROOT / "build" / "folders"))

_NSPAWN: Final = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit")
_INCLUDED: Final = "systemd,systemd-sysv,dbus,python3,ca-certificates,procps"
_ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
}
_NUMBERS: Final = itertools.count()


class Folder:
    """One release with some packages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str, user: str = "root", environ: Mapping[str, str] | None = None) -> str:
        """What a command prints. Raises AssertionError with all of it where it fails."""
        return _printed(self.enter(*command, user=user, environ=environ), timeout=1800)

    def enter(self, *command: str, user: str = "root", environ: Mapping[str, str] | None = None) -> list[str]:
        """The words that run a command inside. With it ends all that it started, and no mount is left."""
        values = {**_ENVIRONMENT, "HOME": "/root" if user == "root" else f"/home/{user}", **(environ or {})}
        words = [*_NSPAWN, f"--directory={self.path}", "--pipe", "--as-pid2", f"--user={user}"]
        words += [f"--setenv={name}={value}" for name, value in values.items()]
        words += [f"--bind-ro={path}" for path in _files_in((environ or {}).values())]
        return [*words, *command]


def _files_in(values: Iterable[str]) -> list[str]:
    """Files and folders of the host that settings name."""
    words = [word for value in values for word in value.split()]
    return [word for word in dict.fromkeys(words) if word.startswith("/") and Path(word).exists()]


def pip_settings() -> dict[str, str]:
    """How pip finds packages here: the host's own settings, and files that they name."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _printed(words: Sequence[str], timeout: float) -> str:
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def kept(release: str, purpose: str, packages: Sequence[str]) -> Folder:
    """The folder of a release with these packages, which is made where it is not there."""
    path = KEPT / release / purpose
    if not path.exists():
        with _made(path) as partial:
            shutil.rmtree(partial, ignore_errors=True)
            _copy(_base(release).path, partial)
            # Nothing is started in a folder that is only written.
            policy = partial / "usr/sbin/policy-rc.d"
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
            folder = Folder(partial)
            folder.run("apt-get", "update", "-q")
            folder.run("apt-get", "install", "-q", "-y", "--no-install-recommends", *packages)
            policy.unlink()
    return Folder(path)


def _base(release: str) -> Folder:
    path = KEPT / release / "base"
    if not path.exists():
        with _made(path) as partial:
            shutil.rmtree(partial, ignore_errors=True)
            _printed(["debootstrap", "--variant=minbase", f"--include={_INCLUDED}", release, str(partial)], 1800)
            # How mirrors are reached from here, and how old they may be, the host's apt knows.
            lines = _printed(["apt-config", "dump"], 60).splitlines(keepends=True)
            wanted = ("Acquire::Check-", "Acquire::http", "Acquire::Retries")
            (partial / "etc/apt/apt.conf.d/90host").write_text(
                "".join(line for line in lines if line.startswith(wanted))
            )
            # Nobody misses these folders after a power cut.
            (partial / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
    return Folder(path)


@contextmanager
def _made(path: Path) -> Iterator[Path]:
    """The folder has its name only once it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.rename(path)


def _copy(source: Path, target: Path) -> None:
    _printed(["cp", "-a", "--reflink=auto", str(source), str(target)], 600)


class Machine:
    """A copy of a folder, in which systemd runs."""

    def __init__(self, folder: Folder, *, own_network: bool = False) -> None:
        """`own_network`: it sees itself alone, so that its servers may have their usual ports."""
        self._network = ["--private-network"] if own_network else []
        self.path = folder.path.with_name(f"{folder.path.name}.{os.getpid()}-{next(_NUMBERS)}")
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Self:
        _copy(self._folder.path, self.path)
        log = self.path.with_name(f"{self.path.name}.log")
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*_NSPAWN, *self._network, f"--directory={self.path}", "--boot"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_up(log)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        finally:
            log.unlink()
        return self

    def _wait_until_up(self, log: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 120
        while not self._is_up():
            assert self._process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.2)

    def _is_up(self) -> bool:
        assert self._process is not None
        number = self._process.pid
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        if not children:
            return False
        self._init = int(children[0])
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            # With its first process all that runs there ends; what it leaves is thrown away.
            os.kill(self._init or self._process.pid, signal.SIGKILL)
        self._process.wait(60)
        shutil.rmtree(self.path)

    def enter(self, *command: str) -> list[str]:
        """The words that run a command inside."""
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd")
        environ = (f"{name}={value}" for name, value in _ENVIRONMENT.items())
        return ["nsenter", f"--target={self._init}", *namespaces, "env", "-i", *environ, *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, as root, with what it printed on either stream as its `stdout`."""
        return subprocess.run(
            self.enter(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )

    def do(self, script: str) -> str:
        """What a shell's script prints, which must succeed."""
        return _printed(self.enter("bash", "-euo", "pipefail", "-c", script), 600)
