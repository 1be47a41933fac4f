"""`pgbridge migrate`: installs and upgrades the schema, or prints it for a DBA."""

from pathlib import Path

import click

from bridge.postgres import schema
from bridge.process.terminal import config_option, exit_codes
from bridge.settings import load


@click.command()
@config_option
@click.option("--sql", "print_sql", is_flag=True, help="Prints the script for a DBA to run with psql; changes nothing.")
@click.option("--dry-run", is_flag=True, help="Lists what would be applied; changes nothing.")
@exit_codes
def migrate(config: Path | None, print_sql: bool, dry_run: bool) -> None:
    """Installs the schema `bridge`, or upgrades it. Safe to run again, and by several at once."""
    if print_sql:
        click.echo(schema.migrate_sql())
        return
    dsn = load(config).postgres.dsn.get_secret_value()
    migrations = schema.pending(dsn) if dry_run else schema.migrate(dsn)
    for migration in migrations:
        click.echo(f"{migration.version:04} {migration.name}: {'would be applied' if dry_run else 'applied'}")
    if not migrations:
        click.echo(f"The schema has all that this pgbridge brings, up to {schema.schema_version():04}; nothing to do.")
