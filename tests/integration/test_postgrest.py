"""deploy/postgrest: a request over PostgREST becomes an event that says who made it, and in which trace.

No package has PostgREST itself. So a request is what PostgREST sends to PostgreSQL for one, as its documentation says:
by the authenticator, in one transaction, role and settings of the request first (docs.postgrest.org, "Authentication",
user impersonation; "Transactions", access mode and transaction-scoped settings).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import nats
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from bridge.brokers.nats.message import unquote_headers
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from tests.support.daemons import Daemon
from tests.support.environment import ROOT
from tests.support.servers import NatsServer
from tests.support.until import LIMIT

FOLDER: Final = ROOT / "deploy" / "postgrest"
TRACEPARENT: Final = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
HEADERS: Final = {"host": "api.test", "content-type": "application/json", "traceparent": TRACEPARENT}
ANNA: Final = {"sub": "anna", "role": "authenticated", "exp": 4102444800}
BEN: Final = {"sub": "ben", "role": "authenticated", "exp": 4102444800}
NOBODY: Final = {"role": "anonymous"}
"""The claims of a request without a token."""

POST_TICKET: Final = """
with pgrst_source as (
  insert into "api"."tickets" ("title")
  select pgrst_body."title" from json_to_record(%s::json) as pgrst_body("title" text)
  returning "api"."tickets".*)
select coalesce(json_agg(_postgrest_t), '[]') from (select * from pgrst_source) as _postgrest_t
"""
GET_TICKETS: Final = """
with pgrst_source as (select "api"."tickets".* from "api"."tickets")
select coalesce(json_agg(_postgrest_t), '[]') from (select * from pgrst_source) as _postgrest_t
"""
CLOSE_TICKET: Final = """
with pgrst_source as (select pgrst_call.* from "api"."close_ticket"("ticket" := %s) as pgrst_call)
select coalesce(json_agg(_postgrest_t), '[]') from (select * from pgrst_source) as _postgrest_t
"""


def configured() -> Mapping[str, str]:
    """What postgrest.conf says."""
    return dict(re.findall(r'^([\w-]+) = "?([^"\n]*)"?$', (FOLDER / "postgrest.conf").read_text(), flags=re.MULTILINE))


class PostgREST:
    """One connection of its pool."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(make_conninfo(dsn, user="authenticator"), autocommit=True)
        self._search_path = ", ".join(f'"{schema}"' for schema in (configured()["db-schemas"], "public"))

    def request(
        self,
        claims: Mapping[str, Any],
        method: str,
        path: str,
        query: str,
        *values: object,
        headers: Mapping[str, str] = HEADERS,
    ) -> Any:
        """The answer's JSON. `query` is PostgREST's for this method and path. Raises what PostgreSQL raises."""
        mode = "read only" if method == "GET" else "read write"
        self._connection.execute(f"begin isolation level read committed {mode}".encode())
        try:
            self._connection.execute(
                "select set_config('search_path', %s, true), set_config('role', %s, true),"
                " set_config('request.jwt.claims', %s, true), set_config('request.method', %s, true),"
                " set_config('request.path', %s, true), set_config('request.headers', %s, true),"
                " set_config('request.cookies', '{}', true)",
                [self._search_path, claims["role"], json.dumps(claims), method, path, json.dumps(headers)],
            )
            [answer] = self._connection.execute(query.encode(), values).fetchone() or [None]
        except psycopg.Error:
            self._connection.execute("rollback")
            raise
        self._connection.execute("commit")
        return answer

    def open_ticket(self, claims: Mapping[str, Any], title: str, *, headers: Mapping[str, str] = HEADERS) -> int:
        [ticket] = self.request(claims, "POST", "/tickets", POST_TICKET, json.dumps({"title": title}), headers=headers)
        assert ticket["opened_by"] == claims["sub"]
        return int(ticket["id"])

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def postgrest(bridge_database: str) -> Iterator[PostgREST]:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute((FOLDER / "api.sql").read_bytes())
    served = PostgREST(bridge_database)
    yield served
    served.close()


@pytest.fixture
def admin(bridge_database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        yield connection


def events(admin: psycopg.Connection) -> list[tuple[str, str, dict[str, Any]]]:
    return admin.execute("select topic, key, headers from bridge.outbox order by id").fetchall()


def test_a_request_becomes_an_event_with_its_actor_and_its_trace(
    postgrest: PostgREST, admin: psycopg.Connection
) -> None:
    ticket = postgrest.open_ticket(ANNA, "The cup leaks")
    [closed] = postgrest.request(ANNA, "POST", "/rpc/close_ticket", CLOSE_TICKET, ticket)
    assert closed["state"] == "closed"
    context = {"traceparent": TRACEPARENT, "actor": '{"sub": "anna", "role": "authenticated"}'}
    assert events(admin) == [
        ("support.ticket.opened", str(ticket), context),
        ("support.ticket.closed", str(ticket), context),
    ]


def test_what_a_request_set_is_gone_with_its_transaction(postgrest: PostgREST, admin: psycopg.Connection) -> None:
    postgrest.open_ticket(ANNA, "The cup leaks")
    postgrest.open_ticket(BEN, "The tea is cold", headers={"host": "api.test"})
    assert [headers for _, _, headers in events(admin)] == [
        {"traceparent": TRACEPARENT, "actor": '{"sub": "anna", "role": "authenticated"}'},
        {"actor": '{"sub": "ben", "role": "authenticated"}'},
    ]


def test_everybody_reads_and_changes_what_is_theirs(postgrest: PostgREST, admin: psycopg.Connection) -> None:
    ticket = postgrest.open_ticket(ANNA, "The cup leaks")
    assert [row["id"] for row in postgrest.request(ANNA, "GET", "/tickets", GET_TICKETS)] == [ticket]
    assert postgrest.request(BEN, "GET", "/tickets", GET_TICKETS) == []
    with pytest.raises(psycopg.Error, match=f"you have no ticket {ticket}") as raised:
        postgrest.request(BEN, "POST", "/rpc/close_ticket", CLOSE_TICKET, ticket)
    assert raised.value.sqlstate == "PT404"
    for column, value in (("opened_by", "ben"), ("opened_at", "2020-01-01")):
        forged = (
            f"""insert into "api"."tickets" ("title", "{column}") values ('mine', '{value}') returning '[]'::json"""
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table tickets"):
            postgrest.request(ANNA, "POST", "/tickets", forged)
    assert [topic for topic, _, _ in events(admin)] == ["support.ticket.opened"]


def test_without_a_token_nothing_is_read_and_nothing_emitted(postgrest: PostgREST, admin: psycopg.Connection) -> None:
    for method, path, query, value in (
        ("GET", "/tickets", GET_TICKETS, ()),
        ("POST", "/tickets", POST_TICKET, ('{"title": "x"}',)),
        ("POST", "/rpc/close_ticket", CLOSE_TICKET, (1,)),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            postgrest.request(NOBODY, method, path, query, *value)
    assert events(admin) == []


@pytest.mark.parametrize("claims", [ANNA, NOBODY], ids=["with a token", "without"])
def test_no_client_emits_events_of_its_own(
    postgrest: PostgREST, admin: psycopg.Connection, claims: Mapping[str, Any]
) -> None:
    assert configured()["db-schemas"] == "api"
    for call in (
        "bridge.emit('support.ticket.opened', '{}'::jsonb)",
        "bridge.append_event('support.ticket.opened', '{}', 'application/json', null, '{}')",
        "bridge.notify('support.ticket.opened', '{}')",
        "support.announce_ticket()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            postgrest.request(claims, "POST", "/rpc/emit", f"select {call}")
    assert events(admin) == []


def test_a_get_cannot_emit(postgrest: PostgREST, admin: psycopg.Connection) -> None:
    ticket = postgrest.open_ticket(ANNA, "The cup leaks")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        postgrest.request(ANNA, "GET", "/rpc/close_ticket", CLOSE_TICKET, ticket)
    assert len(events(admin)) == 1


def test_the_roles_are_those_of_the_configuration(postgrest: PostgREST, admin: psycopg.Connection) -> None:
    anonymous = configured()["db-anon-role"]
    query = """
        select array_agg(r.rolname::text order by r.rolname)
        from pg_auth_members as m join pg_roles as r on r.oid = m.roleid where m.member = 'authenticator'::regrole"""
    assert admin.execute(query).fetchone() == (["anonymous", "authenticated"],)
    query = "select rolinherit, rolsuper, rolcreaterole, rolcanlogin from pg_roles where rolname = %s"
    assert admin.execute(query, ["authenticator"]).fetchone() == (False, False, False, True)
    assert admin.execute(query, [anonymous]).fetchone() == (True, False, False, False)
    query = """
        select array_agg(distinct grantee::regrole::text) from pg_proc, aclexplode(proacl)
        where proname = 'close_ticket' and grantee <> proowner"""
    assert admin.execute(query).fetchone() == (["authenticated"],)


async def test_the_bridge_carries_actor_and_trace_to_the_broker(
    postgrest: PostgREST, bridge_database: str, nats_server: NatsServer, unique: str, tmp_path: Path
) -> None:
    ticket = postgrest.open_ticket(ANNA, "The cup leaks")
    settings = f"""
        name = "shop"
        [postgres]
        dsn = "{bridge_database}"
        [sinks.events]
        type = "nats"
        url = "{nats_server.url}"
        stream = "{unique}"
        [[routes]]
        topic = "support.#"
        sink = "events"
        """
    await NatsSink(NatsSettings(type="nats", url=SecretStr(nats_server.url), stream=unique)).topology(apply=True)
    bridge = Daemon(tmp_path, settings)
    async with await nats.connect(nats_server.url) as client:
        heard = await client.subscribe(f"{unique}.support.ticket.opened")
        await client.flush()
        with bridge:
            message = await heard.next_msg(timeout=LIMIT)
            assert bridge.stop() == 0
    assert message.headers is not None
    headers = unquote_headers(message.headers)
    assert headers["traceparent"] == TRACEPARENT
    assert json.loads(headers["actor"]) == {"sub": "anna", "role": "authenticated"}
    assert headers["ce-type"] == "support.ticket.opened"
    assert json.loads(message.data) == {"ticket": ticket, "title": "The cup leaks"}
