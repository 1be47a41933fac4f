"""What a person has begun, and what goes on while they look at other pages: one thing at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, TypeAlias

import structlog

from bridge.errors import PgbridgeError, UsageError

log = structlog.get_logger()

_AT_ONCE: Final = 1.0
"""Seconds in which a job may end, so that whoever began it is told at once what came of it."""
_STOP_LIMIT: Final = 5.0
"""Seconds that a job has to end by itself when the console stops."""


@dataclass(slots=True, eq=False)
class Job:
    """One of them. Whoever does it counts in it, and ends soon after `stop` is set."""

    title: str
    person: str
    total: int
    """Of what is to be done, as far as it was known at the beginning."""
    page: str = "/dead"
    """Where it was begun."""
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    done: int = 0
    refused: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stopped_by: str | None = None
    ended: datetime | None = None
    words: str = ""
    """What came of it, once it has ended."""
    failed: bool = False
    _clock: float = field(default_factory=time.monotonic)

    @property
    def counted(self) -> int:
        """Done or refused so far."""
        return self.done + self.refused

    @property
    def per_second(self) -> float:
        """On average, since it began."""
        return self.counted / max(0.1, time.monotonic() - self._clock)


Do: TypeAlias = Callable[[Job], Awaitable[str]]
"""Does it, and gives the sentence that says what came of it. Raises PgbridgeError, which says why it ended early."""


class Work:
    """The job that runs, or the last one."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def runs(self) -> bool:
        """Whether a job is under way."""
        return self._task is not None

    def begin(self, title: str, person: str, total: int, do: Do, page: str = "/dead") -> Job:
        """Begins it in the background. Raises UsageError while another one runs."""
        if self.job is not None and self.runs:
            raise UsageError(
                f"{self.job.person} has begun something that goes on: {self.job.title}. Wait for it, or stop it"
            )
        self.job = Job(title, person, total, page)
        self._task = asyncio.create_task(self._run(self.job, do))
        log.info("console.job_began", person=person, job=title, total=total)
        return self.job

    async def _run(self, job: Job, do: Do) -> None:
        try:
            job.words = await do(job)
        except PgbridgeError as error:
            job.failed = True
            before = f" {job.counted:,} of {job.total:,} were done with before that." if job.counted else ""
            job.words = f"Ended early: {error}.{before}"
        except asyncio.CancelledError:
            job.failed = True
            job.words = f"Ended by the end of the console, after {job.counted:,} of {job.total:,}."
            raise
        except Exception:
            job.failed = True
            job.words = "Ended by a defect of pgbridge. The log of the console has more."
            log.exception("console.job_crashed", person=job.person, job=job.title)
        finally:
            job.ended = datetime.now(UTC)
            self._task = None
            log.info(
                "console.job_ended", person=job.person, job=job.title, done=job.done, refused=job.refused,
                total=job.total, stopped_by=job.stopped_by, words=job.words,
            )  # fmt: skip

    async def wait(self, seconds: float = _AT_ONCE) -> None:
        """Until the job that runs has ended, but no longer than that."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)

    async def told(self, job: Job) -> str:
        """What is said to whoever has begun it: what came of it, where it does not take long. Raises UsageError where
        it was in vain."""
        await self.wait()
        if job.failed:
            raise UsageError(job.words)
        return job.words or f"{job.title}: it has begun, and goes on in the background."

    def stop(self, person: str) -> Job | None:
        """Asks the job that runs to end, and gives it; None where none runs."""
        if self.job is None or not self.runs:
            return None
        self.job.stopped_by = self.job.stopped_by or person
        self.job.stop.set()
        return self.job

    async def close(self) -> None:
        """Ends what runs, in order if it can."""
        task = self._task
        self.stop("the console, which stopped")
        await self.wait(_STOP_LIMIT)
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
