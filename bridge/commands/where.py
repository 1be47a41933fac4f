"""`pgbridge where`: follows one event through the log, the sinks, the dead letters and the workers."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

import click

from bridge.brokers.contract import Letter
from bridge.commands.dead_letters import Choice, find
from bridge.errors import PgbridgeError, UsageError
from bridge.postgres.connection import connect
from bridge.postgres.where import AtSink, AtWorker, DeadRow, Whereabouts, in_log, whereabouts
from bridge.process.tasks import run
from bridge.process.terminal import (
    complain,
    config_option,
    exit_codes,
    field,
    heading,
    json_option,
    moment,
    print_json,
)
from bridge.process.visible import json_text
from bridge.settings import Settings, load


@dataclass(frozen=True, slots=True)
class Trace:
    """What is known of an event, of the database and of the brokers' dead letters."""

    known: Whereabouts
    letters: Sequence[Letter]
    """Of the workers' boxes."""
    boxes: Sequence[str]
    """The workers whose boxes were looked into."""
    unreachable: dict[str, str]
    """Why a worker's box could not be looked into."""


async def follow(settings: Settings, asked: str) -> Trace:
    """Follows an event, by its id or its number in the log.

    Raises UsageError for what is neither and for a number that the log does not have, and what the database raises.
    """
    if not settings.reads_outbox:
        raise UsageError('with channels.buffer = "memory" nothing is kept in the database that could be followed')
    connection = await connect(settings.postgres, "pgbridge where")
    async with connection:
        number = int(asked) if asked.isdecimal() else None
        event_id = asked
        if number is not None:
            logged = await in_log(connection, number)
            if logged is None:
                raise UsageError(f"the log has no event {number}; it never had one, or it is pruned")
            event_id = logged.event_id
        known = await whereabouts(connection, _uuid(event_id), number, _progress)
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
    failed: dict[str, str] = {}

    def unreachable(box: str, error: PgbridgeError) -> None:
        failed[box] = str(error)

    # Whoever has handled it, has no letter of it, and a queue is walked from end to end.
    done = {worker.worker for worker in known.workers if worker.state in ("finished", "running", "waiting")}
    boxes = [name for name in settings.workers if name not in done] if known.is_known else list(settings.workers)
    letters: list[Letter] = []
    if boxes:
        ids = tuple(f"{name}:{known.event_id}" for name in boxes)
        letters = await find(settings, Choice(ids=ids), unreachable)
    return Trace(known, letters, boxes, failed)


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise UsageError(f"{text!r} is not the id of an event, which is a UUID, nor its number in the log") from None


def _progress(down_to: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\rlooking through the log, from its end: at {down_to} ", err=True, nl=False)


@click.command()
@click.argument("event_id")
@config_option
@json_option
@exit_codes
def where(event_id: str, config: Path | None, as_json: bool) -> None:
    """Follows one event through log, sinks, dead letters and workers.

    EVENT_ID is the UUID that `bridge.emit()` returned, or the event's number in the log. An event that waits for its
    time is found, too. Ends with 1 when there is no trace of it.
    """
    settings = load(config)
    trace = run(follow(settings, event_id))
    for box, reason in trace.unreachable.items():
        complain(f"the dead letters of {box}: {reason}")
    is_known = trace.known.is_known or bool(trace.letters)
    if as_json:
        print_json(_as_json(trace), indent=2)
    elif is_known:
        click.echo("\n".join(_lines(trace)))
    if not is_known:
        complain(
            f"no trace of the event {trace.known.event_id}: it is not in the log (never committed, or pruned), not "
            f"among those that wait for their time, not among the dead letters of the outbox, in no worker's inbox, "
            f"and not among the dead letters of "
            f"{', '.join(box for box in trace.boxes if box not in trace.unreachable) or 'any worker'}"
        )
        sys.exit(1)


def _as_json(trace: Trace) -> dict[str, object]:
    letters = [
        {
            "id": letter.id, "worker": letter.box, "code": letter.code, "reason": letter.reason,
            "attempts": letter.attempts, "failed_at": letter.failed_at,
        }
        for letter in trace.letters
    ]  # fmt: skip
    return {**asdict(trace.known), "worker_letters": letters, "unreachable": trace.unreachable}


def _lines(trace: Trace) -> list[str]:
    known = trace.known
    lines = [heading(f"event {known.event_id}")]
    if known.logged is not None:
        logged = known.logged
        lines += [
            _line("recorded", f"{moment(logged.recorded_at)}, as number {logged.id} of the log"),
            _line("topic", logged.topic),
            _line("key", "-" if logged.key is None else logged.key),
            _line("payload", f"{logged.bytes} bytes, {logged.content_type}"),
        ]
    elif known.scheduled is not None:
        waits = known.scheduled
        lines += [
            _line("waits", f"until {moment(waits.at)}, and is not in the log before"),
            _line("scheduled", moment(waits.scheduled_at)),
            _line("topic", waits.topic),
            _line("key", "-" if waits.key is None else waits.key),
            _line("payload", f"{waits.bytes} bytes, {waits.content_type}"),
        ]
    else:
        lines.append(_line("log", "it is not there: pruned, or it came from another database"))
    for sink in known.sinks:
        lines += _sink(sink, known.dead_letters)
    shown = {(row.bridge, row.sink or "") for row in known.dead_letters} & {(s.bridge, s.sink) for s in known.sinks}
    for row in known.dead_letters:
        if (row.bridge, row.sink or "") not in shown:
            lines += [heading(_sink_name(row.bridge, row.sink or "")), *_dead(row)]
    letters = {letter.box: letter for letter in trace.letters}
    for worker in known.workers:
        lines += [heading(f"worker {worker.worker}"), *_worker(worker), *_letter(letters.pop(worker.worker, None))]
    for name, letter in letters.items():
        lines += [heading(f"worker {name}"), *_letter(letter)]
    if known.logged is not None and not known.workers and not letters:
        lines += [heading("workers"), _line("inbox", "no worker has claimed or finished it")]
    if known.actions:
        lines.append(heading("what people did"))
    for action in known.actions:
        why = f": {action.why}" if action.why else ""
        lines.append(_line(action.action, f"{moment(action.at)}, {action.letter}, by {action.person}{why}"))
    return lines


def _sink(sink: AtSink, dead: Sequence[DeadRow]) -> list[str]:
    lines = [heading(_sink_name(sink.bridge, sink.sink))]
    rows = [row for row in dead if (row.bridge, row.sink or "") == (sink.bridge, sink.sink)]
    if rows:
        return lines + _dead(rows[0])
    match sink.state:
        case "settled" if not sink.sink:
            said = "settled: passed over"
        case "settled" | "held" | "in a gap":
            said = f"{sink.state}: {sink.meaning}"
        case state:
            said = f"{state}: the sink is at {sink.mark}"
    lines.append(_line("state", said))
    if sink.state != "settled":
        if sink.paused_since is not None:
            lines.append(_line("paused", _pause(sink.paused_since, sink.paused_by, sink.paused_why)))
        if sink.problem is not None:
            lines.append(_line("problem", sink.problem))
        if not sink.leads:
            lines.append(_line("problem", f"no bridge named {sink.bridge} is running"))
    return lines


def _sink_name(bridge: str, sink: str) -> str:
    return f"bridge {bridge}, {f'sink {sink}' if sink else 'events without a route'}"


def _dead(row: DeadRow) -> list[str]:
    return [
        _line("state", f"dead letter {row.id}, since {moment(row.failed_at)}"),
        _line("reason", f"{row.code}: {row.reason}"),
    ]


def _worker(worker: AtWorker) -> list[str]:
    match worker.state:
        case "finished":
            said = f"finished, {moment(worker.finished_at)}"
        case "running":
            said = f"running, claimed by {worker.claimed_by}"
        case "waiting":
            said = f"waiting for another attempt, due {moment(worker.due_at)}"
        case "given up":
            said = "given up; the broker has not taken its dead letter yet"
        case _:
            said = f"dead letter, since {moment(worker.ended_at)}"
    attempts = "1 attempt" if worker.attempts == 1 else f"{worker.attempts} attempts"
    lines = [_line("state", said), _line("attempts", f"{attempts}, the first {moment(worker.started_at)}")]
    if worker.held_key is not None:
        lines.append(_line("holds", f"the key {worker.held_key}"))
    if worker.failure is not None:
        lines.append(_line("reason", f"{worker.failure.get('code')}: {worker.failure.get('reason')}"))
    if worker.result is not None:
        lines.append(_line("result", json_text(worker.result)))
    for operation, effect in worker.effects.items():
        begun = effect.get("started_at")
        since = "not begun" if begun is None else f"begun {moment(datetime.fromisoformat(begun))}"
        outcome = "its result is on record" if "result" in effect else "no result on record"
        lines.append(_line(f"effect {operation}", f"{since}, {outcome}; {effect.get('idempotency_key')}"))
    return lines


def _letter(letter: Letter | None) -> list[str]:
    if letter is None:
        return []
    return [
        _line("dead letter", f"{letter.id}, since {moment(letter.failed_at)}"),
        _line("reason", f"{letter.code}: {letter.reason}"),
    ]


def _pause(since: datetime, who: str | None, why: str | None) -> str:
    return f"since {moment(since)}, by {who}{f': {why}' if why else ''}"


def _line(name: str, text: str) -> str:
    return field(name, text, indent=2)
