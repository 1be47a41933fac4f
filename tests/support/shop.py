"""A shop that takes the results of workers."""

from typing import Final

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
