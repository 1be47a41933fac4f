"""`pgbridge-worker try`: runs a worker's handler on a payload, without broker and database, and tells what a worker
would make of what it does."""

import asyncio
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import click

from bridge.errors import UsageError
from bridge.event import Event, matches
from bridge.process.logs import configure
from bridge.process.tasks import run
from bridge.process.terminal import complain, config_option, exit_codes, json_option, named_values, print_json
from bridge.process.visible import one_line, visible
from bridge.settings import WorkerSettings, load
from workers.attempt import TimedOutError, retry_delays
from workers.build import subscription
from workers.handler import Reject, Retry, Run
from workers.loading import load_handler
from workers.payload import read_json
from workers.testing import MemoryLedger, attempt, make_event

_INTERRUPTED: Final = 130
"""The exit code after Ctrl-C."""

_PATIENCE: Final = 1.0
"""Seconds that a handler may take to end after its time, before a person is told that it does not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a handler did, and what a worker would make of it."""

    outcome: Literal["handled", "rejected", "retry", "timeout", "error"]
    becomes: str
    """What becomes of the event, in words."""
    result: dict[str, Any] | None = None
    reason: str | None = None
    trace: str | None = None


@click.command("try")
@click.argument("name")
@click.argument("payload", type=click.File("rb"))
@click.option("--topic", help="The event's topic; default: the first that the worker subscribes to.")
@click.option("--key", help="The event's key.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header; may be repeated.")
@config_option
@json_option
@exit_codes
def try_worker(
    name: str,
    payload: BinaryIO,
    topic: str | None,
    key: str | None,
    headers: tuple[str, ...],
    config: Path | None,
    as_json: bool,
) -> None:
    """Runs the handler of the worker NAME on a payload, without broker and database.

    PAYLOAD is a file; `-` reads it from standard input. Prints the handler's result and its outside effects, which do
    happen, and ends with 1 where the worker would try the event again or dead-letter it.
    """
    settings = load(config, of="workers")
    own = settings.worker(name)
    handler = load_handler(own.handler, name, own.path)
    bound = handler.configured(own.options, name)
    text = payload.read()
    event = make_event(
        _topic(topic, subscription(name, own, handler.topics).topics),
        text,
        key=key,
        headers=named_values("--header", headers),
        source=f"/try/{settings.name}",
        content_type="application/json" if _is_json(text) else "text/plain",
    )
    configure(settings.observe)
    ledger = MemoryLedger(name)
    # What the handler prints must not stand in the JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        outcome = run(_try(name, own, bound, event, ledger))
    if as_json:
        effects = [
            {"operation": effect.operation, "idempotency_key": key, "result": effect.result}
            for key, effect in ledger.effects.items()
        ]
        print_json(asdict(outcome) | {"effects": effects}, indent=2)
    else:
        _tell(outcome, ledger)
    sys.exit(0 if outcome.outcome == "handled" else 1)


def _topic(given: str | None, patterns: Sequence[str]) -> str:
    """The event's topic. Raises UsageError where the worker would not get it, and where none is the obvious one."""
    listed = ", ".join(patterns)
    if given is not None:
        if not any(matches(pattern, given) for pattern in patterns):
            raise UsageError(f"--topic: the worker subscribes to {listed}, so it would never get {given!r}")
        return given
    for pattern in patterns:
        if not {"*", "#"} & set(pattern.split(".")):
            return pattern
    raise UsageError(f"the worker subscribes to {listed}: name a topic with --topic")


def _is_json(text: bytes) -> bool:
    try:
        read_json(text)
    except (ValueError, RecursionError):
        return False
    return True


async def _try(name: str, own: WorkerSettings, bound: Run, event: Event, ledger: MemoryLedger) -> Outcome:
    """One attempt. Ctrl-C cancels the handler, and a second one ends the process."""
    running = asyncio.ensure_future(attempt(bound, event, ledger, own.timeout))
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        if running.cancelling():
            os._exit(_INTERRUPTED)
        running.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    notice = loop.call_later(own.timeout + _PATIENCE, _say_that_it_goes_on, name, own.timeout)
    try:
        result = await running
    except Reject as error:
        reason = str(error) or "the handler gave no reason"
        return Outcome("rejected", "dead-letters the event at once, code rejected", reason=reason)
    except Retry as error:
        reason = str(error) or "the handler asked for another attempt"
        return Outcome("retry", _again(own, "attempts_exhausted", error.after), reason=reason)
    except TimedOutError as error:
        reason = f"the handler ran longer than workers.{name}.timeout, {own.timeout:g} s"
        return Outcome("timeout", _again(own, "timeout"), reason=reason, trace=_trace(error.__cause__))
    except asyncio.CancelledError:
        sys.exit(_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - whatever an author's code raises is an outcome, with its trace
        reason = f"{type(error).__name__}: {error}"
        return Outcome("error", _again(own, "error"), reason=reason, trace=_trace(error))
    finally:
        notice.cancel()
    reply = "" if own.reply is None else f"calls {own.reply} with the result, and "
    return Outcome("handled", f"{reply}acknowledges the event", result)


def _say_that_it_goes_on(name: str, limit: float) -> None:
    click.echo(
        f"The handler still runs after workers.{name}.timeout, {limit:g} s, and a worker waits for its end, too. "
        "Ctrl-C twice ends it.",
        err=True,
    )


def _again(own: WorkerSettings, code: str, after: float | None = None) -> str:
    delays = retry_delays(own)
    if not delays:
        return f"dead-letters the event, code {code}, since max_attempts is 1"
    delay = f"{after:g} s" if after is not None else f"about {delays[0]:g} s"
    return f"tries the event again after {delay}, and after {own.max_attempts} attempts dead-letters it, code {code}"


def _trace(error: BaseException | None) -> str | None:
    """From the author's first frame on: those before it are how a worker calls a handler."""
    if error is None:
        return None
    own_files = tuple(
        str(Path(__file__).with_name(name))
        for name in ("attempt.py", "handler.py", "inbox.py", "testing.py", "threads.py")
    )
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in (__file__, *own_files):
        frame = frame.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frame))).rstrip() if frame is not None else None


def _tell(outcome: Outcome, ledger: MemoryLedger) -> None:
    if outcome.outcome == "handled":
        click.echo(f"handled: the worker {outcome.becomes}")
        click.echo("result: ", nl=False)
        print_json(outcome.result, indent=2)
    for key, effect in ledger.effects.items():
        click.echo(one_line(f"effect {effect.operation}, key {key}: "), nl=False)
        print_json(effect.result, indent=2)
    if outcome.outcome != "handled":
        if outcome.trace:
            click.echo(visible(outcome.trace), err=True)
        complain(f"{outcome.outcome}: {outcome.reason}\nthe worker {outcome.becomes}")
