"""A shop that takes the results of workers."""

from typing import Any, Final

import psycopg

SHOP: Final = """
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
"""SQL: its table of invoices, and the reply function that fills it and emits an event."""


class Replies:
    """What the reply function was called with, in its order."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)

    def __call__(self) -> list[Any]:
        found = self._connection.execute("SELECT payload::jsonb -> 'of' FROM bridge.outbox ORDER BY id").fetchall()
        return [of for (of,) in found]

    def close(self) -> None:
        self._connection.close()
