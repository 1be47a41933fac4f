"""`pgbridge-worker reconcile`: asks Stripe what became of payments that were begun and have no outcome.

A payment is left without one where its worker's attempts were used up while Stripe did not answer, or where its key
became too old to be used again. What Stripe has is put on record, and the dead letter is replayed, so that the reply
hears of it; nothing is ever charged here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import click
import stripe
from pydantic import ValidationError

from bridge.brokers.contract import Letter, Verdict
from bridge.brokers.registry import broker_of
from bridge.errors import LoginError, PrivilegeError, RefusedError, UnavailableError
from bridge.postgres.connection import connect, database_errors
from bridge.postgres.wire import Connection
from bridge.process.person import current_person
from bridge.process.tasks import run
from bridge.process.terminal import (
    Moment,
    complain,
    config_option,
    dry_run_option,
    exit_codes,
    json_option,
    moment,
    print_json,
    table,
)
from bridge.settings import Settings, load
from workers.loading import load_options
from workers.payments import KEY_AGE, PaymentOptions
from workers.payments.outcome import Outcome
from workers.payments.request import Charge, Operation, Request
from workers.payments.stripe_account import StripeAccount, account_of

_CERTAIN: Final = KEY_AGE + timedelta(hours=1)
"""Age from which on no attempt can still be calling Stripe: what is not there then never happened."""

_OPEN: Final = "select event::text, operation, key, begun_at, age, given, state from bridge.open_effects(%s, %s)"
_SETTLE: Final = "select bridge.settle_effect(%s, %s, %s, %s, %s)"
_AUDIT: Final = "select bridge.audit_dead_letter(%s, 'replayed', %s, %s, %s, %s, %s, %s)"


class OpenEffect(NamedTuple):
    """An effect that was begun and has no outcome; see ``bridge.open_effects()``."""

    event: str
    operation: str
    key: str
    begun_at: datetime
    age: float
    given: Mapping[str, Any] | None
    state: Literal["running", "waiting", "dead"]


_LEFT: Final = {
    "running": "being handled",
    "not_yet": "its key is still good",
}


@dataclass(slots=True)
class Finding:
    """What is known of one of them after Stripe was asked."""

    event: str
    operation: str
    key: str
    begun_at: datetime
    state: str
    """``running``, ``waiting`` for the next attempt, or ``dead``: its event was given up."""
    verdict: Literal["happened", "never", "not_yet", "running", "unknown"]
    """``not_yet``: Stripe has nothing, and the key is young enough to be used again."""
    outcome: Outcome | None = None
    done: str = ""
    """What was done about it, or what is to be done."""


@click.command()
@click.argument("name")
@click.option("--since", type=Moment(), default="7d", show_default=True, help="Only events that came since then.")
@click.option(
    "--again", is_flag=True, help="Also replays dead letters of which nothing happened, so that it happens now."
)
@dry_run_option
@config_option
@json_option
@exit_codes
def reconcile(name: str, since: datetime, again: bool, dry_run: bool, config: Path | None, as_json: bool) -> None:
    """Asks Stripe what became of payments of the worker NAME that were begun and have no outcome.

    What happened is put on record, and its dead letter is replayed, so that the reply hears of it. What never happened,
    and was begun so long ago that nothing can be on its way, may begin again: its dead letter waits for `--again`, or
    for `pgbridge dead replay`. It ends with 1 where something is left that only a person can find out.
    """
    settings = load(config, of="workers")
    findings = run(Reconciliation(settings, name, again=again, dry_run=dry_run).run(since))
    if as_json:
        print_json([_fields(finding) for finding in findings], indent=2)
    elif findings:
        table([_row(finding) for finding in findings], whole=("event",))
    else:
        click.echo("Every payment that was begun has an outcome.")
    unknown = sum(finding.verdict == "unknown" for finding in findings)
    if unknown:
        complain(f"{unknown} left that only a person can find out; then bridge.settle_effect() puts it on record")
        raise SystemExit(1)


class Reconciliation:
    """One run. `again`: see the command."""

    def __init__(self, settings: Settings, name: str, *, again: bool, dry_run: bool) -> None:
        """Raises UsageError for a worker that does not pay, and SettingsError."""
        self._options = load_options(settings, name, PaymentOptions)
        self._settings, self._name, self._again, self._dry_run = settings, name, again, dry_run
        self._person = current_person()

    async def run(self, since: datetime) -> list[Finding]:
        """The oldest first. Raises what the database, Stripe and the broker raise, as PgbridgeError."""
        connection = await connect(self._settings.workers_postgres, "pgbridge reconcile")
        async with connection:
            with database_errors(self._settings.workers_postgres.key("dsn")):
                rows = await (await connection.execute(_OPEN, [self._name, since])).fetchall()
            opened = [OpenEffect(*row) for row in rows]
            with _stripe_errors():
                findings = await find_out(account_of(self._options), opened)
            for finding in findings:
                await self._settle(connection, finding)
            await self._replay(connection, {each.event: each for each in findings if self._is_to_run(each)})
        return findings

    async def _settle(self, connection: Connection, finding: Finding) -> None:
        if finding.verdict not in ("happened", "never"):
            finding.done = finding.done or _LEFT[finding.verdict]
            return
        if self._dry_run:
            finding.done = "to be settled"
            return
        outcome = None if finding.outcome is None else finding.outcome.model_dump_json()
        parameters = [self._name, finding.event, finding.key, outcome, self._person]
        with database_errors(self._settings.workers_postgres.key("dsn")):
            [(settled,)] = await (await connection.execute(_SETTLE, parameters)).fetchall()
        if settled:
            left = finding.state == "dead" and not self._is_to_run(finding)
            finding.done = "settled, not replayed" if left else "settled"
        else:
            finding.verdict, finding.done = "running", "being handled meanwhile"

    def _is_to_run(self, finding: Finding) -> bool:
        wanted = finding.verdict == "happened" or (self._again and finding.verdict in ("never", "not_yet"))
        return finding.state == "dead" and wanted

    async def _replay(self, connection: Connection, findings: Mapping[str, Finding]) -> None:
        """The dead letters of these, by the event's id in the inbox."""
        own = self._settings.workers[self._name]
        if not findings:
            return
        if own.holds or self._dry_run:
            for finding in findings.values():
                finding.done += ", then replayed" if self._dry_run else f"; pgbridge dead replay --worker {self._name}"
            return
        sink = self._settings.sinks[self._settings.sink_of(self._name)]
        box = broker_of(sink).dead_letters(sink, self._name, lanes=own.lanes)

        async def decide(letter: Letter) -> Verdict:
            finding = findings.get(letter.inbox_id or "")
            if finding is None:
                return "keep"
            about = [letter.id, letter.event_id, letter.topic, letter.code, letter.reason, self._person, "reconciled"]
            # Before the broker acts: a crash in between leaves a line too many, never one too few.
            with database_errors(self._settings.workers_postgres.key("dsn")):
                await connection.execute(_AUDIT, about)
            finding.done += ", replayed"
            return "replay"

        if box is not None:
            await box.walk(decide)
        for finding in findings.values():
            if not finding.done.endswith("replayed"):
                finding.done += ", and its dead letter is gone"


async def find_out(account: StripeAccount, opened: Sequence[OpenEffect]) -> list[Finding]:
    """What Stripe has of these. Raises stripe.StripeError."""
    operations: dict[str, Operation] = {}
    findings = []
    for effect in opened:
        finding = Finding(effect.event, effect.operation, effect.key, effect.begun_at, effect.state, "unknown")
        findings.append(finding)
        if effect.state == "running":
            finding.verdict = "running"
        elif (operation := _operation(effect)) is None:
            finding.done = "not of pay(): look yourself"
        else:
            operations[effect.key] = operation
    outcomes = await _outcomes(account, [each for each in opened if each.key in operations], operations)
    for effect, finding in zip(opened, findings, strict=True):
        if effect.key not in operations:
            continue
        finding.outcome = outcomes.get(effect.key)
        if finding.outcome is not None:
            finding.verdict = "happened"
        else:
            finding.verdict = "never" if timedelta(seconds=effect.age) > _CERTAIN else "not_yet"
    return findings


async def _outcomes(
    account: StripeAccount, effects: Sequence[OpenEffect], operations: Mapping[str, Operation]
) -> dict[str, Outcome]:
    """By key. Charges have to be looked for among all of their time, so they are looked for together."""
    outcomes: dict[str, Outcome] = {}
    charges = {key: operation for key, operation in operations.items() if isinstance(operation, Charge)}
    for since, until, keys in _spans([effect for effect in effects if effect.key in charges]):
        outcomes |= await account.find_charges({key: charges[key] for key in keys}, since, until)
    for effect in effects:
        if effect.key not in charges:
            found = await account.find(operations[effect.key], effect.key, effect.begun_at)
            if found is not None:
                outcomes[effect.key] = found
    return outcomes


def _spans(effects: Sequence[OpenEffect]) -> list[tuple[datetime, datetime, list[str]]]:
    """When these, the oldest first, may have happened, with their keys; times that overlap are one."""
    spans: list[tuple[datetime, datetime, list[str]]] = []
    for effect in effects:
        begin, keys = effect.begun_at, [effect.key]
        if spans and effect.begun_at <= spans[-1][1]:
            begin, keys = spans[-1][0], [*spans.pop()[2], effect.key]
        spans.append((begin, effect.begun_at + _CERTAIN, keys))
    return spans


def _operation(effect: OpenEffect) -> Operation | None:
    """What it was to do; None for an effect that another handler made."""
    if effect.given is None or effect.given.get("operation") != effect.operation:
        return None
    try:
        return Request.model_validate(effect.given).root
    except ValidationError:
        return None


@contextmanager
def _stripe_errors() -> Iterator[None]:
    """Turns Stripe's errors into ours."""
    try:
        yield
    except stripe.AuthenticationError as error:
        raise LoginError(f"Stripe refuses the API key: {error.user_message or 'no reason given'}") from error
    except stripe.PermissionError as error:
        raise PrivilegeError(
            f"Stripe: the API key may not read that: {error.user_message or 'no reason given'}"
        ) from error
    except (stripe.APIConnectionError, stripe.RateLimitError) as error:
        raise UnavailableError(f"Stripe does not answer: {error.user_message or type(error).__name__}") from error
    except stripe.StripeError as error:
        raise RefusedError(f"Stripe: {error.user_message or type(error).__name__}") from error


def _fields(finding: Finding) -> dict[str, Any]:
    return {
        "event": finding.event,
        "operation": finding.operation,
        "idempotency_key": finding.key,
        "begun_at": finding.begun_at.isoformat(),
        "state": finding.state,
        "verdict": finding.verdict,
        "outcome": None if finding.outcome is None else finding.outcome.model_dump(mode="json"),
        "done": finding.done,
    }


def _row(finding: Finding) -> dict[str, str]:
    outcome = finding.outcome
    said = "?" if outcome is None else f"{outcome.status} {outcome.amount} {outcome.currency or ''}".rstrip()
    return {
        "event": finding.event,
        "what": finding.operation,
        "begun": moment(finding.begun_at),
        "stripe": "nothing" if finding.verdict in ("never", "not_yet") else said,
        "done": finding.done,
    }
