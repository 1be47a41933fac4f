"""The logins of pgbridge in PostgreSQL, one for each kind of process, as SQL for whoever administers the database."""

import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import conninfo, pq, sql

from bridge.postgres.schema import group_roles_sql
from bridge.process.addresses import is_here

_ROLES: Final[dict[str, str | None]] = {
    "owner": None,
    "bridge": "bridge_relay",
    "workers": "bridge_worker",
    "operator": "bridge_operator",
}
"""By process, the group role of roles.sql whose rights it has. The owner has those of the schema that it installs."""

_HEAD: Final = """\
-- Written by `pgbridge init`: the logins of {bridge}, least privilege each. Run it once, as a superuser of the server:
--   psql -v ON_ERROR_STOP=1 -d {database} -f database.sql
-- Instead of passwords it holds SCRAM verifiers: they tell a server whether a password is right, and not what it is.
begin;

-- The groups whose rights `pgbridge migrate` grants; another database of this server may have them already.
{groups}
"""

_OWNER: Final = """
create role {role} login password {verifier};
grant create, connect on database {database} to {role};
grant pg_read_all_stats to {role};
"""

_MEMBER: Final = """
create role {role} login password {verifier} in role {group};
grant connect on database {database} to {role};
"""

_WHY: Final = {
    "owner": "Installs the schema `bridge` and owns it. It sees other sessions' transactions, so that `pgbridge\n"
    "-- status` can name the one that holds up the rest.",
    "bridge": "The daemon: reads the log and stores how far it is.",
    "workers": "Claim events and call their replies. Grant each reply: grant execute on function ... to bridge_worker.",
    "operator": "People: dead letters, replays, pauses. Give each person a login of this kind.\n"
    "-- The web console acts with it for whom it lets in.",
}

_TAIL: Final = """
-- Whoever calls bridge.emit(), or writes to a table whose trigger does, is a member of bridge_emitter:
--   grant bridge_emitter to web;
commit;
"""


@dataclass(frozen=True, slots=True)
class Logins:
    """What is to be written down."""

    script: str
    """SQL for a superuser."""
    dsns: Mapping[str, str]
    """By process, how it connects, with its password."""
    database: str


def logins(bridge: str, database: str, *, workers: bool) -> Logins:
    """A login for each process that there is. `database` is a libpq connection string without user and password.

    To another machine it will be TLS with a certificate that is checked, unless the string says otherwise.

    Raises ValueError, in words that may follow a setting's key.
    """
    given = _place(database)
    name = str(given["dbname"])
    prefix = bridge.replace("-", "_")
    pieces: list[str] = [_HEAD.format(bridge=bridge, database=shlex.quote(name), groups=group_roles_sql())]
    dsns = {}
    for process, group in _ROLES.items():
        if process == "workers" and not workers:
            continue
        role, password = f"{prefix}_{process}", secrets.token_urlsafe(24)
        dsns[process] = conninfo.make_conninfo(**given, user=role, password=password)
        statements = sql.SQL(_OWNER) if group is None else sql.SQL(_MEMBER)
        made = statements.format(
            role=sql.Identifier(role),
            verifier=sql.Literal(_verifier(role, password)),
            database=sql.Identifier(name),
            group=sql.Identifier(group or ""),
        )
        pieces.append(f"\n-- {_WHY[process]}{made.as_string()}")
    return Logins("".join([*pieces, _TAIL]), dsns, name)


def _place(database: str) -> dict[str, str]:
    try:
        given = {name: str(value) for name, value in conninfo.conninfo_to_dict(database).items()}
    except psycopg.ProgrammingError:
        raise ValueError("is not a libpq connection string; write postgresql://host:5432/database") from None
    for login in ("user", "password"):
        if login in given:
            raise ValueError(f"holds a {login}; leave that out: the logins are about to be made")
    if "dbname" not in given:
        raise ValueError("names no database; write postgresql://host:5432/database")
    if not all(map(is_here, given.get("host", "").split(","))) and "sslmode" not in given:
        given["sslmode"] = "verify-full"
        given.setdefault("sslrootcert", "system")
    return given


def _verifier(role: str, password: str) -> str:
    """What the server stores of a password. libpq makes it, and asks for a connection object that need not connect."""
    nowhere = pq.PGconn.connect_start(b"host=127.0.0.1 port=1")
    try:
        return nowhere.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
    finally:
        nowhere.finish()
