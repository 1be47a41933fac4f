-- PL/pgSQL prepares every expression anew in every transaction, and each function in it: where one event is recorded, that is
-- most of what emit() costs above a bare insert. Hence fewer of them: one condition asks for all that is rare.

-- A setting that some transaction of the session had is there ever after, and empty: so has_context() is to be asked too.
create function bridge.may_have_context() returns boolean
  language sql stable
  return coalesce(
    pg_catalog.current_setting('request.headers', true), pg_catalog.current_setting('request.jwt.claims', true),
    pg_catalog.current_setting('bridge.traceparent', true), pg_catalog.current_setting('bridge.actor', true)
  ) is not null;

-- Whether an event may need more than to be written down: it is wrong, or has headers, or context stands around it.
create function bridge.needs_care(topic text, payload text, key text, headers jsonb) returns boolean
  language sql stable
  return topic is null or topic = '' or octet_length(topic) > 255 or payload is null
      or headers is null or headers <> '{}' or octet_length(key) > bridge.key_limit()
      or bridge.may_have_context();

-- The long way: the headers that the event gets. Raises what is wrong with it.
create function bridge.headers_with_care(topic text, payload text, key text, headers jsonb) returns jsonb
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  if bridge.needs_check(topic, payload, key, headers) then
    headers := bridge.check_event(topic, payload, key, headers);
  end if;
  return case when bridge.has_context() then bridge.add_context(headers) else headers end;
end
$$;

-- As it was, in fewer expressions. It has no SET search_path, for the cost of that (see 0002): so no operator, cast
-- or unqualified name stands in this body.
create or replace function bridge.append_event(topic text, payload text, content_type text, key text, headers jsonb)
  returns uuid
  language plpgsql volatile security definer
as $$
declare
  event pg_catalog.uuid := pg_catalog.gen_random_uuid();
begin
  if bridge.needs_care(topic, payload, key, headers) then
    headers := bridge.headers_with_care(topic, payload, key, headers);
  end if;

  insert into bridge.outbox (id, event_id, topic, key, payload, content_type, headers)
    -- The transaction id before the sequence's value: see next_outbox_id().
    values (case when pg_catalog.pg_current_xact_id() is not null then pg_catalog.nextval('bridge.outbox_id_seq') end,
            event, topic, key, payload, content_type, headers);

  -- NOTIFY takes a lock that serialises all commits of the cluster, so it is sent only to a bridge that sleeps.
  if bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return event;
end
$$;
