"""A login prunes the inbox of its own worker, and of no other: what is gone from an inbox may be handled again."""

from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from bridge.errors import PrivilegeError
from bridge.settings import PostgresSettings
from tests.support.messages import execute
from workers.inbox import Inbox

OLD = (
    "insert into bridge.inbox (worker, event_id, started_at, finished_at) select w, gen_random_uuid(), "
    "now() - interval '9 days', now() - interval '9 days' from unnest('{invoices,stock}'::text[]) w"
)


@pytest.fixture
def logins(bridge_database: str, unique: str) -> Iterator[tuple[str, str]]:
    """Two logins, each a bridge_worker."""
    names = (f"{unique}_a", f"{unique}_b")
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        for name in names:
            admin.execute(sql.SQL("create role {} login in role bridge_worker").format(sql.Identifier(name)))
    yield names
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        for name in names:
            admin.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(name)))


async def prune(dsn: str, login: str, worker: str) -> int:
    settings = PostgresSettings(dsn=SecretStr(make_conninfo(dsn, user=login)), connect_timeout=5.0)
    inbox = Inbox(worker, settings, concurrency=1)
    await inbox.open()
    try:
        return await inbox.prune(timedelta(days=1))
    finally:
        await inbox.close()


async def test_a_login_may_not_prune_the_inbox_of_another_logins_worker_until_an_operator_says_so(
    bridge_database: str, logins: tuple[str, str]
) -> None:
    mine, theirs = logins
    await execute(bridge_database, OLD)
    assert await prune(bridge_database, mine, "invoices") == 1
    assert await prune(bridge_database, theirs, "stock") == 1
    await execute(bridge_database, OLD)
    with pytest.raises(PrivilegeError) as refused:
        await prune(bridge_database, theirs, "invoices")
    assert f"the inbox of the worker 'invoices' is pruned by the role '{mine}', and this is" in str(refused.value)
    assert "select bridge.set_worker_login('invoices', ROLE)" in str(refused.value)
    assert await execute(bridge_database, "select count(*) from bridge.inbox where worker = 'invoices'") == [(1,)]
    await execute(bridge_database, "select bridge.set_worker_login('invoices', %s)", theirs)
    assert await prune(bridge_database, theirs, "invoices") == 1
    with pytest.raises(PrivilegeError):
        await prune(bridge_database, mine, "invoices")


async def test_a_group_of_logins_may_share_a_worker_and_a_role_that_is_gone_leaves_its_workers(
    bridge_database: str, logins: tuple[str, str]
) -> None:
    mine, theirs = logins
    await execute(bridge_database, "select bridge.set_worker_login('invoices', 'bridge_worker')")
    await execute(bridge_database, OLD)
    assert await prune(bridge_database, mine, "invoices") == 1
    assert await prune(bridge_database, theirs, "invoices") == 0
    assert await prune(bridge_database, mine, "stock") == 1
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("drop role {}").format(sql.Identifier(mine)))
    assert await prune(bridge_database, theirs, "stock") == 0
    with pytest.raises(psycopg.errors.UndefinedObject):
        await execute(bridge_database, "select bridge.set_worker_login('stock', %s)", mine)
