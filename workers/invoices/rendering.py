"""Typesetting in processes of their own: a template that loops or eats memory ends its process, and nothing else."""

import asyncio
import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

_SCRIPT: Final = Path(__file__).with_name("typesetter.py")

_MISSING: Final = re.compile(r'the text `"((?:[^"\\]|\\.)+)"` could not be displayed')
"""Typst's words for characters that no font has, quoted as Rust does it."""

_ESCAPE: Final = re.compile(r"\\(?:u\{([0-9a-f]+)\}|(.))")


class TemplateError(Exception):
    """The template does not compile, or takes more time or memory than it may.

    The text of the first is Typst's diagnostic, with file, line and column.
    """


class _DiedError(TemplateError):
    """The process that typesets has died."""


class MissingGlyphsError(Exception):
    """No font has these characters of the data."""

    def __init__(self, characters: str) -> None:
        super().__init__(f"no font has {described(characters)}")
        self.characters = characters


class Typesetters:
    """As many processes as there are cores, each started when it is first needed and kept."""

    def __init__(
        self,
        template: Path,
        font_paths: tuple[Path, ...] = (),
        *,
        system_fonts: bool = True,
        time_limit: float,
        memory_limit: int,
    ) -> None:
        """`time_limit` is in seconds for one document, `memory_limit` in bytes for one process."""
        self._settings = {
            "parent": os.getpid(),
            "template": str(template.resolve()),
            "font_paths": [str(path) for path in font_paths],
            "system_fonts": system_fonts,
            "memory": memory_limit,
        }
        self._time_limit = time_limit
        self._memory_limit = memory_limit
        self._slots = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        self._idle: list[_Typesetter] = []

    async def typeset(self, data: Mapping[str, Any], time: datetime) -> bytes:
        """The PDF; `time` is its creation date. Raises TemplateError and MissingGlyphsError."""
        text = json.dumps(data, ensure_ascii=False)
        request = json.dumps({"data": text, "time": time.isoformat()}).encode()
        async with self._slots:
            kind, body = await self._ask(request)
        if kind == b"P":
            return body
        diagnostic = body.decode()
        missing = "".join(dict.fromkeys("".join(map(_unquoted, _MISSING.findall(diagnostic)))))
        if any(character in text for character in missing):
            raise MissingGlyphsError(missing)
        raise TemplateError(diagnostic)

    async def _ask(self, request: bytes) -> tuple[bytes, bytes]:
        """Of a process that is idle, or of a new one. Raises TemplateError."""
        if self._idle:
            # It may have died since: then it says nothing about this document.
            with contextlib.suppress(_DiedError):
                return await self._ask_one(self._idle.pop(), request)
        return await self._ask_one(_Typesetter(self._settings, self._memory_limit), request)

    async def _ask_one(self, typesetter: "_Typesetter", request: bytes) -> tuple[bytes, bytes]:
        try:
            async with asyncio.timeout(self._time_limit) as deadline:
                answer = await asyncio.to_thread(typesetter.ask, request)
        except BaseException as error:
            # The thread that asks sees the end of the process, and ends as well.
            typesetter.kill()
            if isinstance(error, TimeoutError) and deadline.expired():
                raise TemplateError(f"the template ran longer than time_limit, {self._time_limit:g} s") from None
            raise
        self._idle.append(typesetter)
        return answer

    def close(self) -> None:
        """Ends the processes that have nothing in hand."""
        while self._idle:
            self._idle.pop().end()


class _Typesetter:
    """One process."""

    def __init__(self, settings: Mapping[str, Any], memory_limit: int) -> None:
        self._memory_limit = memory_limit
        # Started from the loop's thread: the kernel ends the process when the thread that started it ends.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Each process has one document in hand, and there are as many as cores.
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )

    def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """Sends the request and waits for the answer. Raises _DiedError."""
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(struct.pack(">I", len(request)) + request)
            self._process.stdin.flush()
            header = self._process.stdout.read(5)
        except BrokenPipeError:
            header = b""
        if len(header) == 5:
            kind, size = struct.unpack(">cI", header)
            body = self._process.stdout.read(size)
            if len(body) == size:
                return kind, body
        raise _DiedError(self._cause_of_death())

    def kill(self) -> None:
        """Ends it at once; whoever waits in `ask` notices."""
        self._process.kill()

    def end(self) -> str:
        """Ends it and gives its resources back; returns what it said on stderr."""
        self._process.kill()
        _, said = self._process.communicate()
        return said.decode(errors="replace")

    def _cause_of_death(self) -> str:
        said = self.end()
        code = self._process.returncode
        if "memory allocation of" in said or "MemoryError" in said:
            return f"the template took more memory than memory_limit, {self._memory_limit >> 20} MiB"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return (
            f"the process that typesets {how}: {said.strip().splitlines()[-1] if said.strip() else 'it said nothing'}"
        )


def described(characters: str) -> str:
    """Characters with their code points, such as ``U+4E2D 中``."""
    return ", ".join(f"U+{ord(one):04X} {one}" if one.isprintable() else f"U+{ord(one):04X}" for one in characters)


def _unquoted(text: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[2], text)
