"""`pgbridge status`: who leads, what waits, and what endangers the database, as text or JSON."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from bridge.postgres.pause import Pause
from bridge.postgres.problems import (
    held_back_words,
    is_filling,
    is_long,
    is_overdue,
    leader_words,
    problem_words,
    queue_words,
    scheduled_words,
    transaction_words,
)
from bridge.postgres.status import COUNTED, Bridge, Guards, Rates, SinkPosition, Status, WorkerStatus, rates, watch
from bridge.process.tasks import run
from bridge.process.terminal import age, config_option, exit_codes, field, heading, json_option, moment, print_json
from bridge.settings import Settings, load


def status_text(settings: Settings, before: Status | None, now: Status) -> str:
    """Everything that a look found; with the look before, rates too.

    It holds colours, which `click.echo` drops where there is no terminal.
    """
    parts = [_bridge(bridge, before, now) for bridge in now.bridges]
    if not parts:
        parts = ["No bridge has run on this database yet."]
    if now.workers:
        parts.append(_workers(now.workers))
    return "\n\n".join([*parts, _guards(now.guards, now, settings)])


def _bridge(bridge: Bridge, before: Status | None, now: Status) -> str:
    lines = [
        heading(f"bridge {bridge.name}"),
        _line("leader", leader_words(bridge, now), bad=bridge.leader is None),
        _line(
            "looks for events",
            "when a NOTIFY wakes it" if bridge.asleep else "all the time: events keep coming, or no sink has room",
        ),
        _line("dead letters", str(bridge.dead_letters), bad=bridge.dead_letters > 0),
    ]
    for position in bridge.sinks:
        lines += _sink(bridge, position, rates(before, now, bridge.name, position.sink) if before else None)
    return "\n".join(lines)


def _sink(bridge: Bridge, position: SinkPosition, rate: Rates | None) -> list[str]:
    held = f", {position.held} of them held" if position.held else ""
    lines = [
        "  " + heading(position.title),
        _line("  backlog", f"{'' if position.backlog_exact else 'about '}{position.backlog} events{held}"),
        _line("  oldest unsent", age(position.oldest_unsent_seconds)),
        _line("  position", f"{position.mark} of {bridge.last_id}, {position.gaps} in gaps"),
    ]
    if position.paused is not None:
        lines.append(_line("  paused", _pause(position.paused)))
    if position.problem is not None:
        lines.append(_line("  problem", problem_words(position), bad=True))
    if rate is not None:
        lines.append(_line("  rates", f"{rate.emitted:.0f} emitted, {rate.settled:.0f} settled a second"))
    return lines


def _workers(workers: Sequence[WorkerStatus]) -> str:
    lines = []
    for worker in workers:
        counts = [
            f"{worker.running} in progress",
            f"{worker.waiting} waiting for another attempt",
            f"{worker.finished_last_hour} finished in the last hour",
        ]
        bound = "" if worker.exact else f" (of the {COUNTED:,} events begun last)"
        lines += [heading(f"worker {worker.worker}"), _line("events", ", ".join(counts) + bound)]
        lines.append(_line("dead letters", str(worker.dead_letters), bad=worker.dead_letters > 0))
        if worker.held_keys:
            lines.append(_line("held keys", str(worker.held_keys), bad=True))
        if worker.paused is not None:
            lines.append(_line("paused", _pause(worker.paused)))
    return "\n".join(lines)


def _pause(pause: Pause) -> str:
    return f"since {moment(pause.since)}, by {pause.who}{f': {pause.why}' if pause.why else ''}"


def _guards(guards: Guards, now: Status, settings: Settings) -> str:
    lines = [
        heading("database"),
        _line("oldest transaction", transaction_words(guards), bad=is_long(guards)),
        _line("NOTIFY queue", queue_words(guards), bad=is_filling(guards)),
        _line("log", f"{guards.outbox_bytes / 1e6:.1f} MB"),
    ]
    if now.scheduled.events:
        lines.append(_line("scheduled", scheduled_words(now), bad=is_overdue(now.scheduled, now)))
    if guards.oldest_event_at is not None and guards.next_prune_at is not None:
        lines.append(_line("oldest event", moment(guards.oldest_event_at)))
        wait = guards.next_prune_at - now.at
        due = f"in {age(wait.total_seconds())}" if wait > timedelta() else "due"
        kept = age(settings.outbox_or_default.retention)
        lines.append(_line("next prune", f"{due} (retention {kept})"))
    lines += [_line("held back", held_back_words(name), bad=True) for name in guards.held_back_by]
    return "\n".join(lines)


def _line(name: str, text: str, *, bad: bool = False) -> str:
    shown = field(name, text, indent=2, label=18)
    return click.style(shown, fg="red") if bad else shown


@click.command()
@config_option
@json_option
@click.option("--watch", "watching", is_flag=True, help="Looks again and again, with rates, until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds between looks.")
@exit_codes
def status(config: Path | None, as_json: bool, watching: bool, interval: float) -> None:
    """Shows who leads, what waits, and what endangers the database. Ends with 1 when nobody leads."""
    settings = load(config)
    is_led = False

    async def look() -> None:
        nonlocal is_led
        before: Status | None = None
        async for now in watch(settings, interval if watching else None, workers=True):
            is_led = any(bridge.name == settings.name and bridge.leader for bridge in now.bridges)
            if as_json:
                print_json(_status_json(before, now))
            else:
                if before is not None and sys.stdout.isatty():
                    click.clear()
                click.echo(status_text(settings, before, now))
            before = now

    try:
        run(look())
    except KeyboardInterrupt:
        sys.exit(130)
    if not is_led:
        click.echo(f"No bridge named {settings.name!r} is running; start one with: pgbridge run", err=True)
        sys.exit(1)


def _status_json(before: Status | None, now: Status) -> dict[str, Any]:
    fields = asdict(now)
    for bridge in fields["bridges"]:
        for sink in bridge["sinks"]:
            rate = rates(before, now, bridge["name"], sink["sink"]) if before else None
            sink |= {"emitted_per_second": rate and rate.emitted, "settled_per_second": rate and rate.settled}
    return fields
