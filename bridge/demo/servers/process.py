"""What all servers have in common: a guarded process that is started, watched for readiness, and ended."""

import random
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bridge.demo.servers import guard
from bridge.errors import UnavailableError

LOOPBACK: Final = "127.0.0.1"

_LOG_TAIL_LINES: Final = 20

_reservations: dict[int, socket.socket] = {}
"""By port, the socket that keeps it for this process."""


class MissingProgramError(UnavailableError):
    """A server's program is not installed here. The message says how to install it."""


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, and that no other call of this function will give out.

    It lies below Linux's range for outgoing connections (32768 and up), so that no such connection takes it while its
    server restarts. It is kept for this process as long as that lives, so tests may run in several processes.
    Raises UnavailableError when there is none.
    """
    for _ in range(1000):
        port = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
        if port in _reservations:
            continue
        reservation = _reserve(port)
        if reservation is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                reservation.close()
                continue
        _reservations[port] = reservation
        return port
    raise UnavailableError(f"no free TCP port on {LOOPBACK} between 20000 and 32000")


def _reserve(port: int) -> socket.socket | None:
    """Keeps other processes from choosing the port before its server listens; None when one has it already.

    A name in Linux's abstract namespace (unix(7)) has one holder on the machine, and is free when that ends.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        holder.bind(f"\0pgbridge-port-{port}")
    except OSError:
        holder.close()
        return None
    return holder


def as_user(command: Sequence[str | Path], user: tuple[int, int] | None) -> list[str]:
    """The command as this (uid, gid), for root only; None: as we are.

    By setpriv(1), since Python forks for another user, and starts a program without fork(2) otherwise: after a fork of
    a process in which gRPC runs, its handlers crashed the child now and then.
    """
    words = [str(word) for word in command]
    if user is None:
        return words
    uid, gid = user
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--", *words]


class Process:
    """One program in a process group of its own, whose whole tree ends when this process ends, however it ends."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        user: tuple[int, int] | None = None,
    ) -> None:
        """Starts the program; its output is appended to `log`. `user` is a (uid, gid) to run as, for root only."""
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                as_user(command, user),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=log.parent,
                env=environment,
                process_group=0,
            )
        self._started_at = guard.start_time(self._popen.pid)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(self._popen.pid), str(self._started_at)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._popen.poll()

    def stop(self, signum: int, limit: float) -> bool:
        """Asks it to end, and kills it after `limit` seconds. Whether it ended by itself."""
        if self.exit_code is None:
            self._popen.send_signal(signum)
        try:
            self._popen.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        self._dismiss_guard()
        return True

    def kill(self) -> None:
        """Ends it and its children with SIGKILL, and waits until they are gone."""
        if self._owns_pid():
            guard.kill_tree(self.pid)
        self._popen.wait()
        self._dismiss_guard()

    def _owns_pid(self) -> bool:
        """False once the process was reaped, from when on its pid may name a stranger."""
        return guard.start_time(self.pid) == self._started_at

    def _dismiss_guard(self) -> None:
        self._guard.kill()
        self._guard.wait()
        if self._guard.stdin:
            self._guard.stdin.close()


class Server(ABC):
    """A server that is ready when `start` returns. Subclasses say how it is launched and how it shows that it answers.

    After `kill`, or when it ended by itself, `start` brings it back on the same port with the same data.
    """

    name = ""
    stop_signal: int = signal.SIGTERM
    start_limit = 60.0
    """Seconds until it must answer. Generous: it only costs time when something is wrong."""
    stop_limit = 30.0
    """Seconds that a clean stop may take."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the parent of this server's own folder, which is named after the server: one of a kind each."""
        self.folder = folder.resolve() / self.name
        self.host = LOOPBACK
        self.port = free_port()
        self._process: Process | None = None

    @abstractmethod
    def _launch(self) -> Process:
        """Starts the program, after preparing its folder when that is new."""

    @abstractmethod
    def _answers(self) -> str | None:
        """Tries the server's own protocol once: None when it answered, else why not."""

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.folder / f"{self.name}.log"

    @property
    def running(self) -> bool:
        """Whether its process exists; False as soon as it was killed or ended by itself."""
        return self._process is not None and self._process.exit_code is None

    @property
    def pid(self) -> int:
        """Its main process. Raises RuntimeError when it was never started, or was stopped or killed."""
        return self._started().pid

    def start(self) -> None:
        """Starts it and waits until it answers. Raises UnavailableError with the end of its log when it does not."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already, as process {self.pid}")
        if self._process is not None:
            self._process.kill()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process = self._launch()
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self, process: Process) -> None:
        deadline = time.monotonic() + self.start_limit
        while True:
            refusal = self._answers()
            # Asked after the answer: on a port that was taken meanwhile, the answer is a stranger's.
            if (code := process.exit_code) is not None:
                raise UnavailableError(f"{self.name} ended with code {code} at its start{self._log_tail()}")
            if refusal is None:
                return
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{self.name} did not answer on {self.host}:{self.port} within {self.start_limit:g} s: "
                    f"{refusal}{self._log_tail()}"
                )
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it cleanly; does nothing when it is stopped. Raises UnavailableError when it had to be killed."""
        process, self._process = self._process, None
        if process is not None and not process.stop(self.stop_signal, self.stop_limit):
            raise UnavailableError(
                f"{self.name} did not stop within {self.stop_limit:g} s, so it was killed{self._log_tail()}"
            )

    def kill(self) -> None:
        """Ends it with SIGKILL, as a crash would; returns when all its processes are gone."""
        process, self._process = self._started(), None
        process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _started(self) -> Process:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not started")
        return self._process

    def _log_tail(self) -> str:
        if not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join([f"; the end of {self.log}:", *(f"  {line}" for line in lines)])
