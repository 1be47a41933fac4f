"""`pgbridge`: one thin command each; what they do is in daemon.py, operate/ and demo/."""

import json
import sys
from pathlib import Path

import click

from bridge import __version__
from bridge.cli_dead import dead
from bridge.cli_operate import replay, status
from bridge.commands.check import check as checks
from bridge.commands.events import emit as emit_event
from bridge.commands.events import tail as tail_events
from bridge.commands.topology import topology as topologies
from bridge.daemon import run_until_signalled
from bridge.errors import UsageError
from bridge.event import Event
from bridge.postgres import schema as migration
from bridge.process.logs import configure
from bridge.process.tasks import run as _run
from bridge.process.tasks import run_daemon
from bridge.process.terminal import config_option as _config
from bridge.process.terminal import exit_codes
from bridge.process.terminal import json_option as _json
from bridge.process.terminal import table as _table
from bridge.settings import load


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Carries committed PostgreSQL events to message queues."""


for operate in (status, dead, replay):
    main.add_command(operate)


@main.command()
@_config
@exit_codes
def run(config: Path | None) -> None:
    """Runs the bridge until SIGTERM or SIGINT. Several of one name stand by for each other."""
    settings = load(config)
    configure(settings.observe)
    run_daemon(run_until_signalled(settings))


@main.command()
@_config
@click.option("--sql", "print_sql", is_flag=True, help="Prints the script for a DBA to run with psql; changes nothing.")
@click.option("--dry-run", is_flag=True, help="Lists what would be applied; changes nothing.")
@exit_codes
def migrate(config: Path | None, print_sql: bool, dry_run: bool) -> None:
    """Installs the schema `bridge`, or upgrades it. Safe to run again, and by several at once."""
    if print_sql:
        click.echo(migration.migrate_sql())
        return
    dsn = load(config).postgres.dsn.get_secret_value()
    found = migration.pending(dsn) if dry_run else migration.migrate(dsn)
    for one in found:
        click.echo(f"{one.version:04} {one.name}: {'would be applied' if dry_run else 'applied'}")
    if not found:
        click.echo(f"The schema is at version {migration.schema_version():04}; nothing to do.")


@main.command()
@_config
@_json
@exit_codes
def check(config: Path | None, as_json: bool) -> None:
    """Checks settings, database, privileges, brokers and topology: one line each, with the mend."""
    settings = load(config)
    worst = 0

    async def look() -> None:
        nonlocal worst
        if not as_json:
            _say(True, "settings", f"name {settings.name!r}")
        async for finding in checks(settings):
            worst = worst or finding.exit_code
            if as_json:
                click.echo(json.dumps({"subject": finding.subject, "ok": finding.ok, "text": finding.text}))
            else:
                _say(finding.ok, finding.subject, finding.text)

    _run(look())
    sys.exit(worst)


def _say(ok: bool, subject: str, text: str) -> None:
    mark = click.style("ok  ", fg="green") if ok else click.style("FAIL", fg="red")
    click.echo(f"{mark}  {subject:<18} {text}")


@main.command()
@_config
@click.option("--apply", is_flag=True, help="Declares what is missing.")
@_json
@exit_codes
def topology(config: Path | None, apply: bool, as_json: bool) -> None:
    """Shows what the brokers have of what these settings need."""
    settings = load(config)
    rows: list[dict[str, str]] = []

    async def look() -> None:
        for owner, declarations in await topologies(settings, apply=apply):
            rows.extend(
                {"owner": owner, "kind": d.kind, "name": d.name, "state": d.state, "detail": d.detail}
                for d in declarations
            )

    _run(look())
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _table(rows)
    if any(row["state"] in ("missing", "differs") for row in rows):
        click.echo("Something is missing or differs; declare what is missing with: pgbridge topology --apply", err=True)
        sys.exit(1)


@main.command()
@click.argument("topic")
@click.argument("payload")
@click.option("--key", help="Events with one key are published in order.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header of your own; may be repeated.")
@_config
@exit_codes
def emit(topic: str, payload: str, key: str | None, headers: tuple[str, ...], config: Path | None) -> None:
    """Sends one event to TOPIC and prints its id. PAYLOAD is JSON or text; `-` reads it from standard input."""
    pairs = {}
    for header in headers:
        name, equals, value = header.partition("=")
        if not equals:
            raise UsageError(f"--header {header!r} is not of the form NAME=VALUE")
        pairs[name] = value
    text = sys.stdin.read() if payload == "-" else payload
    settings = load(config).postgres

    async def send() -> None:
        click.echo(await emit_event(settings, topic, text, key, pairs))

    _run(send())


@main.command()
@click.option("--topic", "topics", multiple=True, metavar="PATTERN", help="Only these; `*` one word, `#` any number.")
@_config
@_json
@exit_codes
def tail(topics: tuple[str, ...], config: Path | None, as_json: bool) -> None:
    """Shows events as they are committed, without consuming them, until Ctrl-C."""
    settings = load(config)

    async def watch() -> None:
        async for event in tail_events(settings.postgres, settings.name, topics):
            click.echo(_as_json(event) if as_json else _as_line(event))

    try:
        _run(watch())
    except KeyboardInterrupt:
        sys.exit(130)


def _as_json(event: Event) -> str:
    fields = event._asdict() | {"payload": event.payload.decode(), "time": event.time.isoformat()}
    return json.dumps(fields | {"headers": dict(event.headers)}, ensure_ascii=False)


def _as_line(event: Event) -> str:
    key = f" [{event.key}]" if event.key is not None else ""
    return f"{event.time:%H:%M:%S.%f} {click.style(event.topic, bold=True)}{key} {event.payload.decode()}"


@main.command()
@click.option("--broker", type=click.Choice(["embedded", "rabbitmq", "pubsub"]), default="embedded", show_default=True)
@click.option("--orders", type=click.IntRange(1), default=200, show_default=True, help="How many orders are placed.")
@click.option("--rate", type=click.FloatRange(0.1), default=20.0, show_default=True, help="Orders a second.")
@click.option("--kill", is_flag=True, help="Kills bridge, worker and database on the way.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="A folder to work in and to keep.")
@_json
@exit_codes
def demo(broker: str, orders: int, rate: float, kill: bool, keep: Path | None, as_json: bool) -> None:
    """The embedded world: a shop whose orders become events, messages and invoices, live."""
    try:
        from bridge.demo.run import run as run_demo
    except ImportError as error:
        raise UsageError(f"the demo lacks the package {error.name!r}: pip install 'pgbridge[demo]'") from error
    sys.exit(run_demo(broker, orders, rate, kill, as_json, keep))


if __name__ == "__main__":
    main()
