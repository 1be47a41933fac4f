"""docs/workers.md, followed to the letter: its commands run in order, and what it shows is what they print.

What a reader is not told to type is done here, too: `pip install` installs this working tree, and the addresses of the
test's own servers are written into bridge.toml.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from tests.support.environment import ROOT, environment, install
from tests.support.servers import RabbitMQServer

PAGE: Final = (ROOT / "docs" / "workers.md").read_text()

VARYING: Final = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "<time>"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<id>"),
    (r"duration_ms=[\d.]+", "duration_ms=<n>"),
    (r"\d+\.\d+s\b", "<seconds>"),
    (r"PostgreSQL \d+\.\d+", "PostgreSQL <version>"),
)
"""What is another at every run, and what stands for it in both texts."""


@dataclass(frozen=True)
class Block:
    """A fenced block of the page."""

    language: str
    lines: list[str]

    @property
    def file(self) -> str | None:
        """The file whose text it shows, named by a comment in its first line."""
        named = re.fullmatch(r"# ([\w./]+)", self.lines[0])
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


def blocks(heading: str) -> Iterator[Block]:
    """Those of the section below a heading."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"{heading}\n")]
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2].splitlines())


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


class Reader:
    """Types the commands of the page into one shell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shims(folder / "shims")
        self.shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env={**environment(folder / "shims"), "PGBRIDGE_OBSERVE__LOG_FORMAT": "text", "COLUMNS": "80"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.daemons: list[tuple[str, str, Path, list[str]]] = []
        """Of each: command, process id, log, and the lines that the page shows of it."""

    @staticmethod
    def _shims(folder: Path) -> None:
        """The two programs that would need a network: both leave pip out."""
        folder.mkdir()
        programs = {
            "python3.11": f'exec {sys.executable} "$@" --without-pip',
            "pip": f'[ "$*" = "install pgbridge pytest" ] && cd {ROOT} && {sys.executable} -m {install.__module__} '
            '"$VIRTUAL_ENV"',
        }
        for name, line in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{line}\n")
            (folder / name).chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, number, _, _ in self.daemons:
            self.type(f"kill -9 {number}")
        assert self.shell.stdin is not None
        self.shell.stdin.close()
        self.shell.wait(30)
        assert self.shell.stdout is not None
        self.shell.stdout.close()

    def type(self, command: str) -> tuple[list[str], int]:
        """What a command prints, and its exit code."""
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        self.shell.stdin.write(f"{{ {command}\n}} < /dev/null; echo; echo done $?\n")
        self.shell.stdin.flush()
        lines: list[str] = []
        for line in self.shell.stdout:
            if ended := re.fullmatch(r"done (\d+)\n", line):
                return lines[:-1] if lines[-1] == "" else lines, int(ended[1])
            lines.append(line.removesuffix("\n"))
        raise AssertionError(f"the shell ended:\n{lines}")

    def follow(self, block: Block) -> None:
        """Does what a block says, and compares what it shows."""
        if block.language == "console":
            for command, expected in block.commands():
                if re.fullmatch(r"pgbridge(-worker)? run.*", command):
                    self._start(command, expected)
                    continue
                printed, _ = self.type(command)
                assert shows(expected, printed), f"{command} printed:\n" + "\n".join(printed)
        elif block.file is not None:
            assert block.content == (self.project / block.file).read_text(), block.file

    @property
    def project(self) -> Path:
        return self.folder / "shop"

    def _start(self, command: str, expected: list[str]) -> None:
        log = self.folder / f"daemon-{len(self.daemons)}.log"
        log.touch()
        self.type(f"{command} >> {log} 2>&1 &")
        [number], _ = self.type("echo $!")
        self.daemons.append((command, number, log, expected))
        self._wait_for(log, expected[:1])

    def _wait_for(self, log: Path, expected: list[str]) -> None:
        """Until the log shows these lines, between any others."""
        deadline = time.monotonic() + 30
        wanted = ["...", *(line for shown in expected for line in (shown, "..."))]
        while not shows(wanted, log.read_text().splitlines()):
            assert time.monotonic() < deadline, f"{expected} is not in:\n{log.read_text()}"
            time.sleep(0.05)

    def stop(self) -> None:
        """Looks for all that the page shows of bridge and worker, and ends them with Ctrl-C."""
        for command, number, log, expected in self.daemons:
            self._wait_for(log, expected)
            self.type(f"kill -INT {number}")
            _, code = self.type(f"wait {number}")
            assert code == 0, f"{command} ended with {code}:\n{log.read_text()}"
        self.daemons.clear()


@pytest.mark.rabbitmq
def test_from_nothing_to_a_running_worker(tmp_path: Path, database: str, rabbitmq: RabbitMQServer, unique: str) -> None:
    rabbitmq.ctl("add_vhost", unique)
    rabbitmq.ctl("set_permissions", "-p", unique, "guest", ".*", ".*", ".*")
    languages = []
    with Reader(tmp_path) as reader:
        for block in blocks("From nothing to a running worker"):
            reader.follow(block)
            languages.append(block.language)
            if block.file == "bridge.toml":
                settings = reader.project / "bridge.toml"
                text = settings.read_text()
                for key, ours in (("dsn", database), ("url", f"{rabbitmq.url.rstrip('/')}/{unique}")):
                    text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{ours}"', text, flags=re.MULTILINE)
                    assert count == 1
                settings.write_text(text)
        reader.stop()
    assert languages == ["console", "python", "python", "console", "console", "toml", *["console"] * 4]


def test_the_examples_of_handlers_and_tests_pass(tmp_path: Path) -> None:
    with Reader(tmp_path) as reader:
        for command in ("python3.11 -m venv .venv", ". .venv/bin/activate", "pip install pgbridge pytest"):
            printed, code = reader.type(command)
            assert code == 0, printed
        names = []
        for heading in ("Writing one", "Testing it"):
            for block in blocks(heading):
                if block.language == "python" and block.file is not None:
                    (tmp_path / block.file).write_text(block.content)
                    names.append(block.file)
        assert names == ["reserve.py", "test_reserve.py", "test_charge.py"]
        printed, code = reader.type("pytest -q")
    assert code == 0, printed
    assert printed[-1].startswith("3 passed")


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (["took 0.61s"], ["took 12.5s"], True),
        (["a", "...", "c"], ["a", "b", "b", "c"], True),
        (["a", "...", "c"], ["a", "c"], True),
        (["a", "...", "c"], ["a", "b", "d"], False),
        (["a ... c"], ["a b c"], True),
        (["a"], ["a", "b"], False),
        (["a.c"], ["abc"], False),
    ],
)
def test_what_the_page_shows_is_compared(expected: list[str], printed: list[str], same: bool) -> None:
    assert shows(expected, printed) == same
