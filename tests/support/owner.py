"""An owner of the schema `bridge` who is no superuser, as on a managed server: he does not see others' sessions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

import psycopg
from psycopg import sql


@contextmanager
def owner_without_rights(dsn: str, role: str) -> Iterator[None]:
    """Makes this role, which owns `bridge.guards()` for a while. `dsn`: the superuser's."""
    with psycopg.connect(dsn, autocommit=True) as admin:

        def run(statements: LiteralString) -> None:
            admin.execute(sql.SQL(statements).format(role=sql.Identifier(role)))

        run(
            "create role {role}; grant usage on schema bridge to {role}; grant select on bridge.outbox to {role}; "
            "alter function bridge.guards() owner to {role}"
        )
        try:
            yield
        finally:
            run("alter function bridge.guards() owner to postgres; drop owned by {role}; drop role {role}")
