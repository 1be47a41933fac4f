"""A reader of a page in docs/, who types its commands in order and compares what they print with what it shows.

What a reader is not told to type is done here, too: `pip install` installs this working tree. `UPDATE_PAGES=1` writes
what is printed into the page instead of comparing; lines of three dots, which stand for lines that are left out, are
then to be put back by hand.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from tests.support.environment import ROOT, environment, install

ID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"

VARYING: Final = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "<time>"),
    (r"\d{4}-\d\d-\d\d\s+\d\d:\d\d:\d\d(\.\d+)? [A-Z]+", "<time>"),
    (ID, "<id>"),
    (r"\bby \S+@\S+:", "by <who>:"),
    (r"duration_ms=[\d.]+", "duration_ms=<n>"),
    (r"\d+\.\d+s\b", "<seconds>"),
    (r"PostgreSQL \d+\.\d+", "PostgreSQL <version>"),
)
"""What is another at every run, and what stands for it in both texts."""

_DAEMON: Final = re.compile(r"(pgbridge(-worker)? run|pgbridge tail|python -m bridge\.demo\.servers)\b.*")
_LOOK: Final = re.compile(r"pgbridge (where|status|dead (list|show))\b.*")
"""What a person types again when it does not show yet what is on its way."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    lines: list[str]

    @property
    def file(self) -> str | None:
        """The file whose text it shows, named by a comment in its first line."""
        named = re.fullmatch(r"(?:#|--) ([\w./]+)", self.lines[0])
        return named[1] if named else None

    @property
    def content(self) -> str:
        """What is in that file."""
        return "\n".join(self.lines[1:]) + "\n"

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """The commands of a console, and the lines that each is shown to print."""
        at = [number for number, line in enumerate(self.lines) if line.startswith("$ ")]
        for start, end in zip(at, [*at[1:], len(self.lines)], strict=True):
            yield self.lines[start][2:], self.lines[start + 1 : end]


class Page:
    """A page of docs/."""

    def __init__(self, name: str) -> None:
        self._path = ROOT / "docs" / name
        self._text = self._path.read_text()

    def headings(self) -> list[str]:
        """Those of the second level."""
        return re.findall(r"^## (.+)$", self._text, flags=re.MULTILINE)

    def blocks(self, heading: str) -> Iterator[Block]:
        """Those of the section below a heading of the second level."""
        [text] = [part for part in re.split(r"^## ", self._text, flags=re.MULTILINE) if part.startswith(f"{heading}\n")]
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            yield Block(found[1], found[2].splitlines())

    def write(self, command: str, shown: list[str], printed: list[str]) -> None:
        """Shows what was printed."""
        old, new = ("".join(f"{line}\n" for line in (f"$ {command}", *lines)) for lines in (shown, printed))
        assert old in self._text
        self._text = self._text.replace(old, new, 1)
        self._path.write_text(self._text)


def told(lines: list[str]) -> str:
    """Lines without what varies, each with its end."""
    text = "".join(f"{line.rstrip()}\n" for line in lines)
    for pattern, stand_in in VARYING:
        text = re.sub(pattern, stand_in, text)
    return text


def shows(expected: list[str], printed: list[str]) -> bool:
    """Whether the page shows what was printed. Three dots stand for any text, and on a line of their own for lines."""
    patterns = (
        r"(?:.*\n)*?" if line == "...\n" else re.escape(line).replace(re.escape("..."), ".*")
        for line in told(expected).splitlines(keepends=True)
    )
    return re.fullmatch("".join(patterns), told(printed)) is not None


@dataclass(frozen=True)
class _Daemon:
    """What runs until it is stopped, as if in a terminal of its own."""

    command: str
    pid: str
    log: Path
    shown: list[str]


class Reader:
    """Types the commands of a page into one shell."""

    def __init__(
        self,
        page: Page,
        folder: Path,
        *,
        pip: str = "install pgbridge pytest",
        installs: str = f"cd {ROOT} && {sys.executable} -m {install.__module__} $VIRTUAL_ENV",
        places: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`folder`: where the shell is at first. `pip`: what the page has pip install. `installs`: what
        installs it here, in the shell's environment. `places`: by addresses that the page shows, those that stand for
        them here."""
        self.page = page
        self.folder = folder
        self._places = places
        self.written: list[str] = []
        """The files that the page has its reader write."""
        self._shims(folder / "shims", pip, installs)
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env={**environment(folder / "shims"), "PGBRIDGE_OBSERVE__LOG_FORMAT": "text", "COLUMNS": "80"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._daemons: list[_Daemon] = []
        self._ids: dict[str, str] = {}
        """By the id of an event that the page shows, the one that the command printed here."""

    @staticmethod
    def _shims(folder: Path, pip: str, installs: str) -> None:
        """The two programs that would need a network: both leave pip out."""
        folder.mkdir()
        programs = {
            "python3.11": f'exec {sys.executable} "$@" --without-pip',
            "pip": f'[ "$*" = "{pip}" ] && {installs}',
        }
        for name, line in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{line}\n")
            (folder / name).chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for daemon in reversed(self._daemons):
            self.type(f"kill -9 {daemon.pid}")
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait(30)
        assert self._shell.stdout is not None
        self._shell.stdout.close()

    def type(self, command: str) -> tuple[list[str], int]:
        """What a command prints, and its exit code."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{{ {command}\n}} < /dev/null; ended=$?; echo; echo done $ended\n")
        self._shell.stdin.flush()
        lines: list[str] = []
        for line in self._shell.stdout:
            if ended := re.fullmatch(r"done (\d+)\n", line):
                return lines[:-1] if lines[-1] == "" else lines, int(ended[1])
            lines.append(line.removesuffix("\n"))
        raise AssertionError(f"the shell ended:\n{lines}")

    def look_until(self, command: str, expected: list[str]) -> None:
        """Types a command again and again until it prints this."""
        deadline = time.monotonic() + 15
        while (printed := self.type(command)[0]) != expected:
            assert time.monotonic() < deadline, f"{command} printed:\n" + "\n".join(printed)
            time.sleep(0.05)

    def follow(self, block: Block) -> None:
        """Does what a block says, and compares what it shows."""
        if block.language == "console":
            for command, shown in block.commands():
                if _DAEMON.fullmatch(command):
                    self.start(command, shown)
                else:
                    self._compare(command, shown)
        elif block.file is not None:
            [folder], _ = self.type("pwd")
            path = Path(folder, block.file)
            if path.exists():
                assert block.content == path.read_text(), block.file
            else:
                path.write_text(self._as_here(block.content))
                self.written.append(block.file)

    def _as_here(self, text: str) -> str:
        for shown, ours in {**self._places, **self._ids}.items():
            text = text.replace(shown, ours)
        return text

    def _as_shown(self, lines: list[str]) -> list[str]:
        for shown, ours in {**self._places, **self._ids}.items():
            lines = [line.replace(ours, shown) for line in lines]
        return lines

    def _compare(self, command: str, shown: list[str]) -> None:
        updates = "UPDATE_PAGES" in os.environ
        deadline = time.monotonic() + (3 if updates else 15)
        while True:
            here, _ = self.type(self._as_here(command))
            printed = self._as_shown(here)
            if shows(shown, printed):
                break
            if not _LOOK.fullmatch(command) or time.monotonic() > deadline:
                if updates:
                    self.page.write(command, shown, printed)
                    shown = printed
                    break
                raise AssertionError(f"{command} printed:\n" + "\n".join(printed))
            time.sleep(0.1)
        ids = [re.findall(ID, "\n".join(lines)) for lines in (shown, here)]
        if len(ids[0]) == len(ids[1]):
            self._ids.update(zip(*ids, strict=True))

    def start(self, command: str, shown: list[str]) -> None:
        """Starts what runs until it is stopped, and waits for the first of the lines that it is shown to print."""
        log = self.folder / f"daemon-{len(list(self.folder.glob('daemon-*')))}.log"
        log.touch()
        self.type(f"{self._as_here(command)} >> {log} 2>&1 &")
        [pid], _ = self.type("echo $!")
        self._daemons.append(_Daemon(command, pid, log, shown))
        if not self._watches(command):
            self._wait_for(log, shown[:1])

    @staticmethod
    def _watches(command: str) -> bool:
        """Whether it shows what others do, and so nothing at its start."""
        return command.startswith("pgbridge tail")

    def wait_for(self, command: str, expected: list[str]) -> None:
        """Until this command has printed these lines, between any others."""
        [log] = [daemon.log for daemon in self._daemons if daemon.command == command]
        self._wait_for(log, expected)

    def _wait_for(self, log: Path, expected: list[str]) -> None:
        deadline = time.monotonic() + 30
        wanted = ["...", *(line for shown in expected for line in (shown, "..."))]
        while not shows(wanted, self._as_shown(log.read_text().splitlines())):
            assert time.monotonic() < deadline, f"{expected} is not in:\n{log.read_text()}"
            time.sleep(0.05)

    def stop(self, command: str = "") -> None:
        """Looks for all that the page shows of what runs, or of this command alone, and ends it, the last one first.

        With Ctrl-C, but `tail`: a shell without a terminal has what it starts in the background ignore that, unless the
        program says otherwise.
        """
        for daemon in list(reversed(self._daemons)):
            if daemon.command.startswith(command):
                self._daemons.remove(daemon)
                self._wait_for(daemon.log, daemon.shown)
                watches = self._watches(daemon.command)
                self.type(f"kill -{'TERM' if watches else 'INT'} {daemon.pid}")
                _, code = self.type(f"wait {daemon.pid}")
                assert code == (143 if watches else 0), f"{daemon.command} ended with {code}:\n{daemon.log.read_text()}"
