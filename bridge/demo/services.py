"""The bridge and the workers as processes of their own, brought back when they end, as systemd would."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import bridge
from bridge.demo.servers.process import Process
from bridge.errors import PgbridgeError, UnavailableError

RESTART_DELAY: Final = 0.5
"""Seconds between an end and the next start (RestartSec)."""
START_LIMIT: Final = 60.0
"""Seconds until the first start must say that it is ready. It only costs time when something is wrong."""
MOST_FAILURES: Final = 60
"""Ends in a row, none of them a kill of ours, after which a service counts as broken: half a minute of an outage."""
_STOP_LIMIT: Final = 30.0
"""Seconds that a service has for its end after SIGTERM."""
_LOG_TAIL_LINES: Final = 10


class Service:
    """One `python -m ...` with its log in a file."""

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        *,
        ready: str,
        folder: Path,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`ready` is the action that the log shows once the process serves. `settings` are variables of its
        environment, which go before those of the file."""
        self.name = name
        self.log = folder / f"{name}.log"
        self.starts = 0
        self._words = words
        self._ready = ready
        self._environment = inherited_environment() | dict(settings or {})
        self._process: Process | None = None

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.exit_code is None

    async def run(self) -> None:
        """Starts the process and brings it back whenever it ends.

        Raises PgbridgeError when it cannot even start once, or ends again and again.
        """
        failures = 0
        while True:
            self._process = process = Process(
                [sys.executable, "-m", *self._words], log=self.log, environment=self._environment
            )
            self.starts += 1
            while (code := process.exit_code) is None:  # noqa: ASYNC110 - processes tell nobody of their end
                await asyncio.sleep(0.02)
            process.kill()  # Nothing of its tree is left behind, and its guard may go.
            failures = 0 if code == -signal.SIGKILL else failures + 1
            if failures > MOST_FAILURES or (failures and self._ready not in self.text()):
                raise PgbridgeError(f"the process {self.name} ended with code {code}; {self.tail()}")
            await asyncio.sleep(RESTART_DELAY)

    async def ready(self) -> None:
        """Waits until the first start serves. Raises UnavailableError after START_LIMIT seconds."""
        try:
            async with asyncio.timeout(START_LIMIT):
                while self._ready not in self.text():  # noqa: ASYNC110 - a file tells nobody of its lines
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise UnavailableError(
                f"the process {self.name} was not ready within {START_LIMIT:g} s; {self.tail()}"
            ) from None

    def kill(self) -> None:
        """Ends it with SIGKILL, as a crash would; `run` brings it back."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> int | None:
        """Asks it to end, after `run` was cancelled. Its exit code; None when it never started."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.stop(signal.SIGTERM, _STOP_LIMIT)
        return process.exit_code

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def tail(self) -> str:
        """The end of the log, for an error."""
        lines = self.text().splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join([f"the end of {self.log}:", *(f"  {line}" for line in lines)])


def inherited_environment() -> dict[str, str]:
    """Our environment without what would override the demo's settings, and with this very copy of the packages."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PGBRIDGE_", "PG")) and name not in ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET")
    }
    home = str(Path(bridge.__file__).resolve().parents[1])
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [home, kept.get("PYTHONPATH")]))}
