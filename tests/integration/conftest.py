"""What tests of the workers share: a database whose shop takes their results."""

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from bridge.settings import PostgresSettings

SHOP = """
CREATE SCHEMA shop;
CREATE TABLE shop.invoice (event_id uuid, result jsonb);
CREATE FUNCTION shop.rendered(event_id uuid, result jsonb) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = shop, pg_temp AS $$
BEGIN
    IF result ? 'refuse' THEN
        RAISE EXCEPTION 'no such order' USING ERRCODE = result ->> 'refuse';
    END IF;
    INSERT INTO shop.invoice VALUES (event_id, result);
    PERFORM bridge.emit('shop.invoice.rendered', result);
END $$;
GRANT USAGE ON SCHEMA shop TO bridge_worker;
"""


@pytest.fixture
def shop(bridge_database: str, unique: str) -> Iterator[PostgresSettings]:
    """A database with a reply function, and the settings of a login that is a bridge_worker and nothing more."""
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(SHOP)
        role = sql.Identifier(unique)
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN IN ROLE bridge_worker").format(role))
    yield PostgresSettings(dsn=SecretStr(make_conninfo(bridge_database, user=unique)), connect_timeout=5.0)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP ROLE {}").format(role))
