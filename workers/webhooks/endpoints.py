"""`pgbridge-worker webhooks`: what people do with endpoints and their deliveries."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString

import click

from bridge.errors import UsageError
from bridge.postgres import webhooks as database
from bridge.postgres.connection import connect
from bridge.postgres.webhooks import Attempt, Delivery, Endpoint, Message
from bridge.postgres.wire import Connection
from bridge.process.tasks import run
from bridge.process.terminal import (
    Moment,
    age,
    config_option,
    dry_run_option,
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
    endpoint, secret = _ask(
        config,
        "select endpoint, signing_secret from bridge.add_endpoint(%s, %s, %s, %s, %s, %s)",
        *(url, list(topics), description, concurrency, rate, private),
    )
    shown = {"endpoint": endpoint, **_for_the_receiver(secret, public)}
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
    found = run(_list(config))
    if as_json:
        print_json([asdict(endpoint) for endpoint in found], indent=2)
    elif found:
        table([_row(endpoint) for endpoint in found], whole=("id", "url"), wrapped=True)
    else:
        click.echo("There are no endpoints; add one: pgbridge-worker webhooks add URL --topic PATTERN")


async def _list(config: Path | None) -> list[Endpoint]:
    async with _connected(config) as connection:
        return await database.endpoints(connection)


def _row(endpoint: Endpoint) -> dict[str, str]:
    return {
        "id": str(endpoint.id),
        "url": endpoint.url,
        "due": str(endpoint.due),
        "sending": str(endpoint.sending),
        "failed": str(endpoint.failed),
        "skipped": str(endpoint.skipped),
        "last success": moment(endpoint.last_success_at),
        "topics": ", ".join(endpoint.topics),
        "state": endpoint.words(_now()),
    }


def _now() -> datetime:
    return datetime.now().astimezone()


@webhooks.command("show")
@_endpoint_argument
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most deliveries of each kind.")
@config_option
@json_option
@exit_codes
def show_endpoint(endpoint: int, limit: int, config: Path | None, as_json: bool) -> None:
    """Shows one endpoint, what is sent to it next, and its last deliveries."""
    found, deliveries = run(_show(config, endpoint, limit))
    if as_json:
        print_json({**asdict(found), "deliveries": [asdict(delivery) for delivery in deliveries]}, indent=2)
        return
    _print_fields({"state": found.words(_now()), **asdict(found)})
    if deliveries:
        click.echo()
        table([_delivery_row(delivery) for delivery in deliveries], whole=("delivery",))


async def _show(config: Path | None, number: int, limit: int) -> tuple[Endpoint, list[Delivery]]:
    async with _connected(config) as connection:
        found = await database.endpoint(connection, number)
        if found is None:
            raise UsageError(f"there is no endpoint {number}; `pgbridge-worker webhooks list` shows those that are")
        return found, await database.deliveries(connection, number, limit)


def _delivery_row(delivery: Delivery) -> dict[str, str]:
    return {
        "delivery": str(delivery.id),
        "state": delivery.state,
        "attempts": str(delivery.attempts),
        "due": moment(delivery.due_at),
        "finished": moment(delivery.finished_at),
        "topic": delivery.topic,
        "key": delivery.key or "-",
        "status": str(delivery.last_status or "-"),
        "reason": delivery.last_error or "-",
    }


@webhooks.command("delivery")
@_delivery_argument
@config_option
@json_option
@exit_codes
def show_delivery(delivery: int, config: Path | None, as_json: bool) -> None:
    """Shows one delivery: its body, and each attempt with the beginning of its answer."""
    found, attempts = run(_delivery(config, delivery))
    fields = {"id": found.id, "endpoint": found.endpoint, **asdict(found)}
    if as_json:
        print_json({**fields, "made": [asdict(attempt) for attempt in attempts]}, indent=2)
        return
    del fields["body"]
    _print_fields(fields)
    for attempt in attempts:
        status = "no answer" if attempt.status is None else f"status {attempt.status}"
        took = "" if attempt.duration is None else f" after {attempt.duration:.3f} s"
        click.echo("\n" + heading(f"attempt {attempt.number}, {moment(attempt.at)}: {status}{took}"))
        for text in filter(None, (attempt.error, attempt.answer)):
            click.echo(visible(text))
    click.echo(f"\n{heading('body')}\n{visible(found.body)}")


async def _delivery(config: Path | None, number: int) -> tuple[Message, list[Attempt]]:
    async with _connected(config) as connection:
        found = await database.delivery(connection, number)
        if found is None:
            raise UsageError(
                f"there is no delivery {number}; `pgbridge-worker webhooks show ENDPOINT` shows the last ones"
            )
        return found, await database.attempts(connection, number)


@webhooks.command("resend")
@_delivery_argument
@config_option
@exit_codes
def resend_delivery(delivery: int, config: Path | None) -> None:
    """Sends a delivery again, whatever became of it, with its whole schedule of attempts."""
    run(_resend(config, delivery))
    click.echo("It is due now.", err=True)


async def _resend(config: Path | None, number: int) -> None:
    async with _connected(config) as connection:
        await database.resend(connection, number)


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
    [secret] = _ask(config, "select bridge.rotate_secret(%s, %s, %s)", endpoint, grace, private)
    shown = {"endpoint": endpoint, **_for_the_receiver(secret, public)}
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
    [done] = _ask(config, "select bridge.disable_endpoint(%s, %s)", endpoint, why)
    click.echo("Disabled." if done else "It was disabled already.", err=True)


@webhooks.command("enable")
@_endpoint_argument
@config_option
@exit_codes
def enable_endpoint(endpoint: int, config: Path | None) -> None:
    """Sends an endpoint what comes from now on; what it missed stays skipped, see `recover`."""
    done = run(_enable(config, endpoint))
    click.echo("Enabled." if done else "It was enabled; its circuit breaker is closed.", err=True)


async def _enable(config: Path | None, number: int) -> bool:
    async with _connected(config) as connection:
        return await database.enable(connection, number)


@webhooks.command("recover")
@_endpoint_argument
@click.option(
    "--since",
    type=Moment(),
    required=True,
    help='What was given up or skipped since then: "2026-02-03 14:05", "2d" ago.',
)
@dry_run_option
@config_option
@exit_codes
def recover_endpoint(endpoint: int, since: datetime, dry_run: bool, config: Path | None) -> None:
    """Enables an endpoint, and sends it what failed for good or was skipped since a time."""
    click.echo(run(_recover(config, endpoint, since, dry_run)), err=True)


async def _recover(config: Path | None, number: int, since: datetime, dry_run: bool) -> str:
    async with _connected(config) as connection:
        if dry_run:
            counts = await database.recoverable(connection, number, since)
            return f"{counts.total} would be due: {counts.failed} failed for good, {counts.skipped} were skipped."
        return f"{await database.recover(connection, number, since)} are due now."


@webhooks.command("remove")
@_endpoint_argument
@config_option
@exit_codes
def remove_endpoint(endpoint: int, config: Path | None) -> None:
    """Forgets an endpoint, with its secrets and its deliveries, also those that were not sent yet."""
    _ask(config, "select bridge.remove_endpoint(%s)", endpoint)
    click.echo("Removed.", err=True)


@asynccontextmanager
async def _connected(config: Path | None) -> AsyncIterator[Connection]:
    async with await connect(load(config).postgres, "pgbridge webhooks") as connection:
        yield connection


def _ask(config: Path | None, query: LiteralString, *parameters: object) -> tuple[Any, ...]:
    """The one row that it gives."""
    return run(_asked(config, query, *parameters))


async def _asked(config: Path | None, query: LiteralString, *parameters: object) -> tuple[Any, ...]:
    async with _connected(config) as connection:
        [row] = await database.asked(connection, query, *parameters)
        return row


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
