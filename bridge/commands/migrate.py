"""`pgbridge migrate`: installs and upgrades the schema, or prints it for a DBA."""

from pathlib import Path

import click

from bridge.errors import UsageError
from bridge.postgres import schema
from bridge.postgres.connection import has_password
from bridge.process.terminal import config_option, exit_codes
from bridge.settings.load import load_postgres


@click.command()
@config_option
@click.option("--dsn", help="The owner's connection string, without a password; default: postgres.dsn of the settings.")
@click.option("--sql", "print_sql", is_flag=True, help="Prints the script for a DBA to run with psql; changes nothing.")
@click.option("--dry-run", is_flag=True, help="Lists what would be applied; changes nothing.")
@exit_codes
def migrate(config: Path | None, dsn: str | None, print_sql: bool, dry_run: bool) -> None:
    """Installs the schema `bridge`, or upgrades it. Safe to run again, and by several at once.

    It takes the rights of the schema's owner, which the bridge's own login need not have: name that one with --dsn.
    Then no settings are needed.
    """
    if print_sql:
        click.echo(schema.migrate_sql())
        return
    if dsn is None:
        dsn = load_postgres(config).dsn.get_secret_value()
    elif has_password(dsn):
        raise UsageError(
            "--dsn: others on this machine can read a command's arguments; "
            "leave the password to ~/.pgpass or PGPASSWORD"
        )
    migrations = schema.pending(dsn) if dry_run else schema.migrate(dsn)
    for migration in migrations:
        click.echo(f"{migration.version:04} {migration.name}: {'would be applied' if dry_run else 'applied'}")
    if not migrations:
        click.echo(f"The schema has all that this pgbridge brings, up to {schema.schema_version():04}; nothing to do.")
