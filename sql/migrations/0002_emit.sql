-- Recording events in the caller's transaction. What append_event() costs, every such transaction pays:
-- one INSERT, and for the rest only expressions that PL/pgSQL evaluates without a query.

-- The JSON object in a setting that others write; null when it holds anything else.
create function bridge.json_object(value text) returns jsonb
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  return case when jsonb_typeof(value::jsonb) = 'object' then value::jsonb end;
exception when data_exception then
  return null;
end
$$;

-- Headers that an event takes from its surroundings: traceparent and actor.
-- bridge.* is set by people who use pgbridge, so a mistake in it is raised. request.* is what PostgREST makes of
-- a client's request: no client may break a transaction by sending a strange header, so there it is left out.
create function bridge.context() returns jsonb
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  -- W3C Trace Context, 3.2: version-trace id-parent id-flags; zero ids and version ff are invalid.
  traceparent_form constant text := '^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$';
  traceparent text := nullif(current_setting('bridge.traceparent', true), '');
  setting text := nullif(current_setting('bridge.actor', true), '');
  actor jsonb;
begin
  if traceparent is not null and traceparent !~ traceparent_form then
    raise exception 'the setting bridge.traceparent is no W3C traceparent: %', left(traceparent, 80)
      using errcode = 'invalid_parameter_value',
            hint = 'It looks like 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.';
  elsif traceparent is null and nullif(current_setting('request.headers', true), '') is not null then
    traceparent := bridge.json_object(current_setting('request.headers')) ->> 'traceparent';
    if traceparent !~ traceparent_form then
      traceparent := null;
    end if;
  end if;

  if setting is not null then
    actor := bridge.json_object(setting);
    if actor ->> 'sub' is null and actor ->> 'role' is null then
      raise exception 'the setting bridge.actor is no JSON object with sub or role'
        using errcode = 'invalid_parameter_value', hint = 'It looks like {"sub": "user-1", "role": "clerk"}.';
    end if;
  elsif nullif(current_setting('request.jwt.claims', true), '') is not null then
    actor := bridge.json_object(current_setting('request.jwt.claims'));
  end if;
  actor := nullif(jsonb_strip_nulls(jsonb_build_object('sub', actor ->> 'sub', 'role', actor ->> 'role')), '{}');

  return jsonb_strip_nulls(jsonb_build_object('traceparent', traceparent, 'actor', actor));
end
$$;
comment on function bridge.context() is
  'traceparent and actor, from bridge.traceparent and bridge.actor or else from PostgREST''s request settings.';

-- Whether any of the settings that context() reads is there, without the cost of reading them.
create function bridge.has_context() returns boolean
  language sql stable
  return coalesce(pg_catalog.current_setting('request.headers', true), '') <> ''
      or coalesce(pg_catalog.current_setting('request.jwt.claims', true), '') <> ''
      or coalesce(pg_catalog.current_setting('bridge.traceparent', true), '') <> ''
      or coalesce(pg_catalog.current_setting('bridge.actor', true), '') <> '';

create function bridge.check_topic(topic text) returns void
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  if topic is null then
    raise exception 'the topic of an event is null'
      using errcode = 'null_value_not_allowed', hint = 'Give dotted words, such as shop.order.placed.';
  elsif topic = '' then
    raise exception 'the topic of an event is empty'
      using errcode = 'invalid_parameter_value', hint = 'Give dotted words, such as shop.order.placed.';
  elsif octet_length(topic) > 255 then
    raise exception 'the topic of an event has % bytes; 255 are allowed', octet_length(topic)
      using errcode = 'invalid_parameter_value',
            hint = 'The topic is the routing key, which AMQP limits to 255 bytes; put details into the payload.';
  end if;
end
$$;

create function bridge.check_headers(headers jsonb) returns void
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  name text;
begin
  if jsonb_typeof(headers) <> 'object' then
    raise exception 'the headers of an event are a JSON %, not an object', jsonb_typeof(headers)
      using errcode = 'invalid_parameter_value', hint = 'Give an object, such as {"tenant": "acme"}.';
  end if;
  for name in select jsonb_object_keys(headers) loop
    if name ~* '^(ce-|cloudevents)' then
      raise exception 'the header name % is reserved for CloudEvents attributes', quote_ident(name)
        using errcode = 'reserved_name', hint = 'Choose a name that begins neither with ce- nor with cloudEvents.';
    elsif name !~ '^[!-9;-~]{1,128}$' then
      raise exception 'the header name % is not legal', quote_ident(name)
        using errcode = 'invalid_parameter_value',
              hint = 'Use 1 to 128 visible ASCII characters without spaces and colons: what every broker can carry.';
    end if;
  end loop;
end
$$;

-- A transaction that notifies cannot be prepared (two-phase commit), so the bell can be silenced: the event is then
-- found by the bridge's next poll.
create function bridge.ring() returns void
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  if coalesce(current_setting('bridge.doorbell', true), '') <> 'off' then
    perform pg_notify('bridge_bell', '');
  end if;
end
$$;
comment on function bridge.ring() is
  'Wakes bridges that sleep. Say "set local bridge.doorbell = off" in transactions that are to be prepared.';

-- What makes an event with a plain topic, a payload and no headers of its own take the short way.
create function bridge.needs_check(topic text, payload text, headers jsonb) returns boolean
  language sql immutable
  return topic is null or topic = '' or octet_length(topic) > 255 or payload is null or headers is null or headers <> '{}';

-- Raises what is wrong with an event; returns its headers.
create function bridge.check_event(topic text, payload text, headers jsonb) returns jsonb
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  perform bridge.check_topic(topic);
  if payload is null then
    raise exception 'the payload of an event of topic % is null', quote_literal(topic)
      using errcode = 'null_value_not_allowed',
            hint = 'Give a value; the JSON value null is written ''null''::jsonb.';
  end if;
  perform bridge.check_headers(coalesce(headers, '{}'));
  return coalesce(headers, '{}');
end
$$;

create function bridge.add_context(headers jsonb) returns jsonb
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  return bridge.context() || headers;
end
$$;

-- SET search_path would cost as much as half an insert, on every call. What it guards against is kept out otherwise:
-- no operator, cast or unqualified name stands in this body. Expressions that need them are in functions that
-- have the setting, or whose body was bound when they were created (SQL with RETURN).
create function bridge.append_event(topic text, payload text, content_type text, key text, headers jsonb) returns uuid
  language plpgsql volatile security definer
as $$
declare
  event pg_catalog.uuid := pg_catalog.gen_random_uuid();
  own_xid pg_catalog.xid8;
  next_id pg_catalog.int8;
begin
  if bridge.needs_check(topic, payload, headers) then
    headers := bridge.check_event(topic, payload, headers);
  end if;
  if bridge.has_context() then
    headers := bridge.add_context(headers);
  end if;

  -- The transaction id before the sequence's value: see next_outbox_id().
  own_xid := pg_catalog.pg_current_xact_id();
  next_id := pg_catalog.nextval('bridge.outbox_id_seq');
  insert into bridge.outbox (id, event_id, topic, key, payload, content_type, headers)
    values (next_id, event, topic, key, payload, content_type, headers);

  -- NOTIFY takes a lock that serialises all commits of the cluster, so it is sent only to a bridge that sleeps.
  if bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return event;
end
$$;
comment on function bridge.append_event(text, text, text, text, jsonb) is
  'What emit() and notify() come down to. Explicit headers win over those of context().';

-- The planner puts these bodies in the place of their calls, so the overloads cost nothing.
create function bridge.emit(topic text, payload jsonb, key text default null, headers jsonb default '{}') returns uuid
  language sql volatile
  return bridge.append_event(topic, payload::text, 'application/json', key, headers);
comment on function bridge.emit(text, jsonb, text, jsonb) is
  'Records an event in this transaction and returns its id. Events with one key are published in order.';

create function bridge.emit(topic text, payload json, key text default null, headers jsonb default '{}') returns uuid
  language sql volatile
  return bridge.append_event(topic, payload::text, 'application/json', key, headers);
comment on function bridge.emit(text, json, text, jsonb) is
  'Records an event in this transaction and returns its id. The JSON text travels exactly as it is.';

create function bridge.emit(topic text, payload text, key text default null, headers jsonb default '{}') returns uuid
  language sql volatile
  return bridge.append_event(topic, payload, 'text/plain', key, headers);
comment on function bridge.emit(text, text, text, jsonb) is
  'Records an event with a text/plain payload. A bare literal is text to PostgreSQL: write ''{}''::jsonb for JSON.';

create function bridge.notify(channel text, payload text) returns void
  language sql volatile
  begin atomic
    select bridge.append_event(channel, coalesce(payload, ''), 'text/plain', channel, '{}');
  end;
comment on function bridge.notify(text, text) is
  'Takes the place of pg_notify(): same arguments, but durable and of any size. In order per channel, which is the key.';

create function bridge.intake(channels text[], payloads text[]) returns bigint
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  own_xid xid8;
  stored bigint;
begin
  if cardinality(channels) is distinct from cardinality(payloads) then
    raise exception 'intake() got % channels and % payloads', cardinality(channels), cardinality(payloads)
      using errcode = 'invalid_parameter_value', hint = 'Give one payload for each channel.';
  end if;
  own_xid := pg_current_xact_id();
  insert into bridge.outbox (id, topic, key, payload, content_type)
    select nextval('bridge.outbox_id_seq'), heard.channel, heard.channel, heard.payload, 'text/plain'
    from (
      select n.channel, n.payload from unnest(channels, payloads) with ordinality as n(channel, payload, position)
      order by n.position
    ) as heard;
  get diagnostics stored = row_count;
  if bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return stored;
end
$$;
comment on function bridge.intake(text[], text[]) is
  'Stores notifications that the bridge has heard: one event each, in order; returns how many. Topic and key: the channel.';

-- A row is ours if it is visible although its transaction still runs. Subtransactions have ids of their own, so
-- xmin is not simply compared with ours. The log is read from its end: no id above our first one is older than
-- this transaction's start.
create function bridge.emitted() returns setof bridge.outbox
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  epoch constant bigint := 4294967296;
  own_xid constant bigint := pg_current_xact_id_if_assigned()::text::bigint;
  first_id bigint;
  event record;
begin
  if own_xid is null then
    return;
  end if;
  for event in select o.id, o.created_at from bridge.outbox as o order by o.id desc loop
    exit when event.created_at < transaction_timestamp();
    first_id := event.id;
  end loop;
  return query
    select o.* from bridge.outbox as o
    cross join lateral (select (o.xmin::text::bigint - own_xid % epoch + epoch) % epoch as distance) as since
    where o.id >= first_id
      -- Transaction ids wrap around: what lies more than half the circle ahead is older than we are.
      and since.distance < epoch / 2
      and pg_xact_status((own_xid + since.distance)::text::xid8) = 'in progress'
    order by o.id;
end
$$;
comment on function bridge.emitted() is
  'The events that this transaction has emitted so far, in order: for tests that roll back.';
