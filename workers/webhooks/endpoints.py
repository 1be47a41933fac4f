"""`pgbridge-worker webhooks`: what people do with endpoints and their deliveries."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, LiteralString

import click
import psycopg
from psycopg.rows import dict_row

from bridge.errors import UsageError
from bridge.postgres.connection import connect_blocking, database_errors
from bridge.process.terminal import (
    Moment,
    age,
    config_option,
    exit_codes,
    field,
    heading,
    json_option,
    moment,
    print_json,
    table,
)
from bridge.process.visible import visible
from bridge.settings import load
from bridge.settings.models import parse_duration, parse_rate
from workers.webhooks.signature import new_key_pair

_ENDPOINTS: Final = """
select id, url, topics, description, concurrency, rate, created_at, disabled_at, disabled_why, breaker, failures,
       open_until, paused_until, failing_since, last_success_at, due, sending, failed, skipped
  from bridge.webhook_endpoints
"""

_DELIVERY: Final = """
select d.id, d.endpoint, d.event_id::text, m.topic, m.key, d.state, d.attempts, d.due_at, d.last_status, d.last_error,
       d.created_at, d.finished_at, m.event_time, m.body
  from bridge.webhook_delivery d join bridge.webhook_message m using (event_id) where d.id = %s
"""

_ATTEMPTS: Final = """
select number, at, status, duration, error, answer from bridge.webhook_attempt where delivery = %s order by number
"""

_DELIVERIES: Final = """
select id, event_id::text, topic, key, state, attempts, due_at, last_status, last_error, created_at, finished_at
  from bridge.endpoint_deliveries(%s, %s)
"""

"""Characters of an error in a list; `delivery` has all of it."""

_OF_THE_CALLER: Final = (
    psycopg.errors.InvalidParameterValue,
    psycopg.errors.NullValueNotAllowed,
    psycopg.errors.NoDataFound,
    psycopg.errors.ObjectInUse,
    psycopg.errors.ObjectNotInPrerequisiteState,
)
"""What the functions raise over what they are given."""


class Rate(click.ParamType[float]):
    """As in the settings, ``10/s`` or ``100/m``, in deliveries a second; or ``none``, which is infinite."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if value == "none":
            return float("inf")
        try:
            return value if isinstance(value, float) else parse_rate(value)
        except ValueError as error:
            self.fail(f'{value!r} {error}; "none" is no limit', param, ctx)


class Duration(click.ParamType[timedelta]):
    """A length of time, as ``24h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        try:
            return timedelta(seconds=parse_duration(value))
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


_endpoint_argument = click.argument("endpoint", type=int)
_delivery_argument = click.argument("delivery", type=int)
_asymmetric_option = click.option(
    "--asymmetric", is_flag=True, help="Signs with a key pair (v1a): the receiver gets the public half."
)


@click.group()
def webhooks() -> None:
    """Adds, shows and mends the endpoints that webhooks are sent to.

    It takes a login that has the role bridge_operator.
    """


@webhooks.command("add")
@click.argument("url")
@click.option(
    "--topic", "topics", multiple=True, required=True, metavar="PATTERN",
    help="What it gets; `*` is one word, `#` any number. May be given again.",
)  # fmt: skip
@click.option("--description", default="", help="For people.")
@click.option("--concurrency", type=int, default=4, show_default=True, help="Most requests at once.")
@click.option("--rate", type=Rate(), help="Such as 10/s or 100/m; default: no limit.")
@_asymmetric_option
@config_option
@json_option
@exit_codes
def add_endpoint(
    url: str,
    topics: tuple[str, ...],
    description: str,
    concurrency: int,
    rate: float | None,
    asymmetric: bool,
    config: Path | None,
    as_json: bool,
) -> None:
    """Sends webhooks to URL from now on, and shows the secret for its receiver, this once."""
    private, public = new_key_pair() if asymmetric else (None, None)
    [made] = _ask(
        config,
        "select endpoint, signing_secret from bridge.add_endpoint(%s, %s, %s, %s, %s, %s)",
        *(url, list(topics), description, concurrency, rate, private),
    )
    shown = {"endpoint": made["endpoint"], **_for_the_receiver(made["signing_secret"], public)}
    if as_json:
        print_json(shown, indent=2)
    else:
        _print_fields(shown)
        click.echo("Give it to the receiver: it is not shown again.", err=True)


def _for_the_receiver(secret: str, public: str | None) -> dict[str, str]:
    """A private key stays where it is."""
    return {"secret": secret} if public is None else {"public_key": public}


@webhooks.command("change")
@_endpoint_argument
@click.option("--url", help="Where it is from now on.")
@click.option("--topic", "topics", multiple=True, metavar="PATTERN", help="What it gets, instead of what it got.")
@click.option("--description", help="For people.")
@click.option("--concurrency", type=int, help="Most requests at once.")
@click.option("--rate", type=Rate(), help='Such as 10/s or 100/m; "none": no limit.')
@config_option
@exit_codes
def change_endpoint(
    endpoint: int,
    url: str | None,
    topics: tuple[str, ...],
    description: str | None,
    concurrency: int | None,
    rate: float | None,
    config: Path | None,
) -> None:
    """Changes where an endpoint is, what it gets, or how fast."""
    changes = (url, list(topics) or None, description, concurrency, rate)
    if all(change is None for change in changes):
        raise UsageError("nothing is to be changed: give --url, --topic, --description, --concurrency or --rate")
    _ask(config, "select bridge.change_endpoint(%s, %s, %s::text[], %s, %s, %s)", endpoint, *changes)
    click.echo("Changed.", err=True)


@webhooks.command("list")
@config_option
@json_option
@exit_codes
def list_endpoints(config: Path | None, as_json: bool) -> None:
    """Lists the endpoints, with what waits for each."""
    found = _ask(config, f"{_ENDPOINTS} order by id")
    if as_json:
        print_json(found, indent=2)
    elif found:
        table([_row(endpoint) for endpoint in found], whole=("id", "url"), wrapped=True)
    else:
        click.echo("There are no endpoints; add one: pgbridge-worker webhooks add URL --topic PATTERN")


def _row(endpoint: Mapping[str, Any]) -> dict[str, str]:
    return {
        "id": str(endpoint["id"]),
        "url": endpoint["url"],
        "due": str(endpoint["due"]),
        "sending": str(endpoint["sending"]),
        "failed": str(endpoint["failed"]),
        "skipped": str(endpoint["skipped"]),
        "last success": moment(endpoint["last_success_at"]),
        "topics": ", ".join(endpoint["topics"]),
        "state": _state(endpoint),
    }


def _state(endpoint: Mapping[str, Any]) -> str:
    """In words, the gravest first."""
    now = datetime.now().astimezone()
    if endpoint["disabled_at"] is not None:
        return f"disabled: {endpoint['disabled_why']}"
    if endpoint["breaker"] == "open":
        return f"failing, next try in {age((endpoint['open_until'] - now).total_seconds())}"
    if endpoint["paused_until"] is not None and endpoint["paused_until"] > now:
        return f"asked to wait {age((endpoint['paused_until'] - now).total_seconds())}"
    if endpoint["breaker"] == "half open":
        return "failing, tried one by one"
    return "failing" if endpoint["failing_since"] is not None else "ok"


@webhooks.command("show")
@_endpoint_argument
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most deliveries of each kind.")
@config_option
@json_option
@exit_codes
def show_endpoint(endpoint: int, limit: int, config: Path | None, as_json: bool) -> None:
    """Shows one endpoint, what is sent to it next, and its last deliveries."""
    with _asking(config) as asked:
        found = asked(f"{_ENDPOINTS} where id = %s", endpoint)
        deliveries = asked(_DELIVERIES, endpoint, limit)
    if not found:
        raise UsageError(f"there is no endpoint {endpoint}; `pgbridge-worker webhooks list` shows those that are")
    [fields] = found
    if as_json:
        print_json({**fields, "deliveries": deliveries}, indent=2)
        return
    _print_fields({"state": _state(fields), **fields})
    if deliveries:
        click.echo()
        table([_delivery_row(delivery) for delivery in deliveries], whole=("delivery",))


def _delivery_row(delivery: Mapping[str, Any]) -> dict[str, str]:
    return {
        "delivery": str(delivery["id"]),
        "state": delivery["state"],
        "attempts": str(delivery["attempts"]),
        "due": moment(delivery["due_at"]),
        "finished": moment(delivery["finished_at"]),
        "topic": delivery["topic"],
        "key": delivery["key"] or "-",
        "status": str(delivery["last_status"] or "-"),
        "reason": delivery["last_error"] or "-",
    }


@webhooks.command("delivery")
@_delivery_argument
@config_option
@json_option
@exit_codes
def show_delivery(delivery: int, config: Path | None, as_json: bool) -> None:
    """Shows one delivery: its body, and each attempt with the beginning of its answer."""
    with _asking(config) as asked:
        found = asked(_DELIVERY, delivery)
        attempts = asked(_ATTEMPTS, delivery)
    if not found:
        raise UsageError(
            f"there is no delivery {delivery}; `pgbridge-worker webhooks show ENDPOINT` shows the last ones"
        )
    [fields] = found
    if as_json:
        print_json({**fields, "made": attempts}, indent=2)
        return
    body = fields.pop("body")
    _print_fields(fields)
    for attempt in attempts:
        status = "no answer" if attempt["status"] is None else f"status {attempt['status']}"
        took = "" if attempt["duration"] is None else f" after {attempt['duration']:.3f} s"
        head = f"attempt {attempt['number']}, {moment(attempt['at'])}: {status}{took}"
        click.echo("\n" + heading(head))
        for text in filter(None, (attempt["error"], attempt["answer"])):
            click.echo(visible(text))
    click.echo(f"\n{heading('body')}\n{visible(body)}")


@webhooks.command("resend")
@_delivery_argument
@config_option
@exit_codes
def resend_delivery(delivery: int, config: Path | None) -> None:
    """Sends a delivery again, whatever became of it, with its whole schedule of attempts."""
    _ask(config, "select bridge.resend_delivery(%s)", delivery)
    click.echo("It is due now.", err=True)


@webhooks.command("rotate")
@_endpoint_argument
@click.option("--grace", type=Duration(), default="24h", show_default=True, help="How long the old secret signs, too.")
@_asymmetric_option
@config_option
@json_option
@exit_codes
def rotate_secret(endpoint: int, grace: timedelta, asymmetric: bool, config: Path | None, as_json: bool) -> None:
    """Gives an endpoint a new secret, and shows it, this once; meanwhile the old one signs as well."""
    private, public = new_key_pair() if asymmetric else (None, None)
    [made] = _ask(config, "select bridge.rotate_secret(%s, %s, %s) as secret", endpoint, grace, private)
    shown = {"endpoint": endpoint, **_for_the_receiver(made["secret"], public)}
    if as_json:
        print_json(shown, indent=2)
    else:
        _print_fields(shown)
        click.echo(f"Give it to the receiver within {age(grace.total_seconds())}: it is not shown again.", err=True)


@webhooks.command("disable")
@_endpoint_argument
@click.option("--why", default="", help="The reason, for people.")
@config_option
@exit_codes
def disable_endpoint(endpoint: int, why: str, config: Path | None) -> None:
    """Sends an endpoint nothing more; what is due is skipped, and so is what comes."""
    [done] = _ask(config, "select bridge.disable_endpoint(%s, %s) as done", endpoint, why)
    click.echo("Disabled." if done["done"] else "It was disabled already.", err=True)


@webhooks.command("enable")
@_endpoint_argument
@config_option
@exit_codes
def enable_endpoint(endpoint: int, config: Path | None) -> None:
    """Sends an endpoint what comes from now on; what it missed stays skipped, see `recover`."""
    [done] = _ask(config, "select bridge.enable_endpoint(%s) as done", endpoint)
    click.echo("Enabled." if done["done"] else "It was enabled; its circuit breaker is closed.", err=True)


@webhooks.command("recover")
@_endpoint_argument
@click.option(
    "--since",
    type=Moment(),
    required=True,
    help='What was given up or skipped since then: "2026-02-03 14:05", "2d" ago.',
)
@config_option
@exit_codes
def recover_endpoint(endpoint: int, since: datetime, config: Path | None) -> None:
    """Enables an endpoint, and sends it what failed for good or was skipped since a time."""
    [done] = _ask(config, "select bridge.recover_endpoint(%s, %s) as count", endpoint, since)
    click.echo(f"{done['count']} are due now.", err=True)


@webhooks.command("remove")
@_endpoint_argument
@config_option
@exit_codes
def remove_endpoint(endpoint: int, config: Path | None) -> None:
    """Forgets an endpoint, with its secrets and its deliveries, also those that were not sent yet."""
    _ask(config, "select bridge.remove_endpoint(%s)", endpoint)
    click.echo("Removed.", err=True)


class _Asked:
    """A connection whose rows are dicts."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def __call__(self, query: LiteralString, *parameters: object) -> list[dict[str, Any]]:
        """Raises UsageError for what the database does not take of what it was given, with the way to mend it."""
        try:
            return self._connection.cursor(row_factory=dict_row).execute(query, parameters).fetchall()
        except _OF_THE_CALLER as error:
            hint = f". {error.diag.message_hint}" if error.diag.message_hint else ""
            raise UsageError(f"{error.diag.message_primary}{hint}") from error


@contextmanager
def _asking(config: Path | None) -> Iterator[_Asked]:
    """One transaction."""
    with connect_blocking(load(config).postgres, "pgbridge webhooks") as connection, database_errors():
        yield _Asked(connection)


def _ask(config: Path | None, query: LiteralString, *parameters: object) -> Sequence[dict[str, Any]]:
    with _asking(config) as asked:
        return asked(query, *parameters)


def _print_fields(fields: Mapping[str, Any]) -> None:
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(field(name, _shown(value), label=width))


def _shown(value: Any) -> str:
    match value:
        case None | "":
            return "-"
        case datetime():
            return moment(value)
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)
