"""The daemons as an operator runs them: processes with a bridge.toml, stopped by signals, watched by their log."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Daemon:
    """`python -m bridge.cli run` (or another module and command) over one settings file."""

    def __init__(
        self,
        folder: Path,
        settings: str | Path,
        *command: str,
        module: str = "bridge.cli",
        python: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` is the text of bridge.toml, or where one is; `command` defaults to ``run``, `python` to this
        interpreter; with another one, what is installed in its environment runs. `environment` is added to ours."""
        self.folder = folder
        self._more = environment or {}
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(settings, str):
            self.config = folder / "bridge.toml"
            self.config.write_text(settings, encoding="utf-8")
        else:
            self.config = settings
        interpreter = [sys.executable] if python is None else [str(python), "-P"]
        self.command = [*interpreter, "-m", module, *(command or ("run",)), "--config", str(self.config)]
        self.log = folder / f"{module}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._read_from = 0

    def start(self) -> None:
        """Starts it; `wait_for` tells when it is where a test wants it."""
        self._read_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log, env={**_environment(), **self._more})

    def lines(self) -> list[dict[str, Any]]:
        """What was logged since the last start.

        Without a last line that has no end yet: Linux shows a write to a reader page by page.
        """
        with self.log.open("rb") as log:
            log.seek(self._read_from)
            whole, _, _ = log.read().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]

    def wait_for(self, action: str, timeout: float = 30.0, *, count: int = 1) -> dict[str, Any]:
        """The `count`th log line with this action since the start. Raises AssertionError when none comes."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = [line for line in self.lines() if line.get("action") == action]
            if len(found) >= count:
                return found[count - 1]
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {action!r} in:\n{self.log.read_text()[-4000:]}")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout: float = 30.0) -> int:
        """The exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run_command(*arguments: str, module: str = "bridge.cli", timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs `pgbridge` (or another module's command) to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=_environment(),
        check=False,
    )


def _environment() -> dict[str, str]:
    """Ours, without settings that would leak into a test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PGBRIDGE_")}
