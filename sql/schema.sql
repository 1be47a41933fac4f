-- The whole schema of pgbridge, for reading. Generated from sql/migrations/ and sql/roles.sql by
-- python -m bridge.postgres.schema > sql/schema.sql; change those, never this file.

-- migrations/0001_tables.sql ------------------------------------------------------------

-- The log of events, how far each bridge has read it, and what could not be published.

create schema if not exists bridge;
comment on schema bridge is 'pgbridge: events of this database on their way to a message queue';

-- CACHE 1: a session that kept a stock of ids would hand out old ones long after newer ones were read.
create sequence bridge.outbox_id_seq as bigint cache 1;

-- A reader takes an id that it cannot see for lost once every transaction that was running has ended. That
-- holds only if the transaction had its xid before the id was taken: hence this order.
create function bridge.next_outbox_id() returns bigint
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  perform pg_current_xact_id();
  return nextval('bridge.outbox_id_seq');
end
$$;
comment on function bridge.next_outbox_id() is
  'Guards rows that do not come through emit(): the transaction id is taken before the sequence''s value.';

create table bridge.outbox (
  id           bigint primary key default bridge.next_outbox_id(),
  event_id     uuid not null default gen_random_uuid(),
  topic        text not null,
  key          text,
  payload      text not null,
  content_type text not null,
  headers      jsonb not null default '{}',
  created_at   timestamptz not null default clock_timestamp()
) with (
  -- Append-only: vacuum by the number of rows, not by a share of a table that grows all week, so that the
  -- visibility map is fresh for the readers and the pruned space is soon used again.
  autovacuum_vacuum_insert_scale_factor = 0,
  autovacuum_vacuum_insert_threshold = 100000,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 50000,
  autovacuum_analyze_scale_factor = 0,
  autovacuum_analyze_threshold = 100000
);
alter sequence bridge.outbox_id_seq owned by bridge.outbox.id;
comment on table bridge.outbox is 'The log: one row an event, never updated, pruned after the retention.';

create table bridge.cursor (
  name              text primary key,
  mark              bigint not null default 0,
  gaps              int8multirange not null default '{}',
  horizon           xid8 not null,
  system_identifier bigint not null,
  leader            text,
  leader_since      timestamptz,
  stored_at         timestamptz not null default now()
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
comment on table bridge.cursor is
  'How far each bridge has read: the highest id settled, the ids below it not seen yet, and until when to look for them.';
comment on column bridge.cursor.system_identifier is
  'The cluster that horizon belongs to; transaction ids of another cluster mean nothing.';

create table bridge.bell (
  name   text primary key,
  asleep boolean not null default true
) with (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100);
comment on table bridge.bell is 'Which bridges sleep: only while one does, emit() sends a NOTIFY.';

-- How many bridges sleep, where every emit() looks: an expression that reads a sequence costs a fraction of a query.
create sequence bridge.sleepers as bigint minvalue 0;
comment on sequence bridge.sleepers is 'How many rows of bridge.bell say asleep; kept by its trigger.';

create function bridge.somebody_sleeps() returns boolean
  language sql volatile
  return coalesce(pg_sequence_last_value('bridge.sleepers'), 0) > 0;

-- A sequence takes part in no transaction: hence at the end of the one that changes the bell, when little can roll it
-- back. The new value is seen at once, so whoever takes a transaction id afterwards rings.
create function bridge.count_sleepers() returns trigger
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  -- One at a time, so that each sees what the one before has committed.
  perform pg_advisory_xact_lock(hashtextextended('pgbridge sleepers', 0));
  perform setval('bridge.sleepers', (select count(*) from bridge.bell where asleep));
  return null;
end
$$;

create constraint trigger count_sleepers after insert or update or delete on bridge.bell
  deferrable initially deferred for each row execute function bridge.count_sleepers();

create table bridge.dead_letter (
  id           bigint generated always as identity primary key,
  bridge       text not null,
  event_id     uuid not null,
  sequence     bigint not null,
  topic        text not null,
  key          text,
  payload      text not null,
  content_type text not null,
  headers      jsonb not null,
  created_at   timestamptz not null,
  sink         text,
  code         text not null,
  reason       text not null,
  attempts     int not null,
  failed_at    timestamptz not null default now()
);
-- A page that is read again after a crash may be dead-lettered again; one letter is enough.
create unique index dead_letter_once on bridge.dead_letter (bridge, event_id, coalesce(sink, ''));
comment on table bridge.dead_letter is 'Events that no retry can publish, with the reason; sink is null when no route took it.';

create table bridge.migration (
  version    int primary key,
  name       text not null,
  checksum   text not null,
  applied_at timestamptz not null default now()
);
comment on table bridge.migration is 'Which migrations of pgbridge this database has; checksum is the SHA-256 of the file.';

-- migrations/0002_emit.sql ------------------------------------------------------------

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

-- migrations/0003_watch.sql ------------------------------------------------------------

-- Events from tables: statement-level triggers with transition tables, so a statement that changes 100,000 rows
-- costs one INSERT ... SELECT. Not seen: TRUNCATE, and statements that name a partition or child of the watched table.

-- The trigger function. Arguments: topic, the key's columns and the watched columns as text[] ('' for all of them).
-- Payload: {"operation", "schema", "table", "new", "old"}, rows as to_jsonb() writes them.
-- Key: the column's text as in JSON; of several columns the JSON array of their values, as [7, "eu"]. After an
-- update it is the new row's.
--
-- It runs with the rights of the schema's owner, so that writers need none. Two ways to make that owner run foreign
-- code are closed: a hand-made trigger whose new_rows is a temporary view, and a type whose owner gave it a cast to json.
create function bridge.capture() returns trigger
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- The plan that is cached for one row must not join 100,000 pairs by nested loops, nor be compiled for its cost.
  set enable_nestloop = off
  set jit = off
as $$
declare
  keys text[] := tg_argv[1];
  watched text[] := nullif(tg_argv[2], '');
  hidden text[] := '{}';
  present text[];
  own_types boolean;
  head text := format('{"operation": %s, "schema": %s, "table": %s, "new": ',
                      to_json(lower(tg_op)), to_json(tg_table_schema), to_json(tg_table_name));
  surroundings jsonb := case when bridge.has_context() then bridge.context() else '{}' end;
  own_xid xid8;
  stored bigint;
begin
  select array_agg(a.attname::text), bool_or(a.atttypid >= 16384) into present, own_types
  from pg_trigger as t
  join pg_attribute as a on a.attrelid = t.tgrelid and a.attnum > 0 and not a.attisdropped
  where t.tgrelid = tg_relid and t.tgname = tg_name and tg_level = 'STATEMENT'
    and (tg_op = 'DELETE' or t.tgnewtable = 'new_rows') and (tg_op = 'INSERT' or t.tgoldtable = 'old_rows');
  if present is null then
    raise exception 'bridge.capture() serves no trigger but those of bridge.watch()'
      using errcode = 'trigger_protocol_violated', hint = format('select bridge.watch(%L)', tg_relid::regclass);
  end if;
  if own_types and exists (
    select from pg_cast as c join pg_proc as f on f.oid = c.castfunc join pg_roles as r on r.oid = f.proowner
    where c.casttarget in ('json'::regtype, 'jsonb'::regtype) and c.castsource >= 16384
      and not r.rolsuper and r.rolname <> current_user
  ) then
    raise exception 'a cast to json made by a role other than % stands in the way of bridge.watch()', current_user
      using errcode = 'insufficient_privilege',
            hint = 'It would run with that role''s rights. Drop it, give its function to that role, or unwatch the table.';
  end if;
  if not (keys || coalesce(watched, '{}')) <@ present then
    raise exception 'a column that bridge.watch() was told of is gone from %', tg_relid::regclass
      using errcode = 'undefined_column',
            hint = format('Call bridge.watch() again; it was told of %s.', keys || coalesce(watched, '{}'));
  end if;
  if watched is not null then
    hidden := array(select unnest(present) except select unnest(watched));
  end if;

  -- The transaction id before the sequence's values: see next_outbox_id(). A statement without rows takes none.
  if tg_op = 'INSERT' then
    if not exists (select from new_rows) then
      return null;
    end if;
  elsif not exists (select from old_rows) then
    return null;
  end if;
  own_xid := pg_current_xact_id();

  -- OFFSET 0 keeps the planner from repeating to_jsonb() wherever its result is used.
  if tg_op = 'INSERT' then
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when cardinality(keys) = 1 then c.entire ->> keys[1]
                  else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n)) end,
             head || (c.entire - hidden)::text || ', "old": null}', 'application/json', surroundings
      from (select to_jsonb(r) as entire from new_rows as r offset 0) as c;
  elsif tg_op = 'DELETE' then
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when cardinality(keys) = 1 then c.entire ->> keys[1]
                  else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n)) end,
             head || 'null, "old": ' || (c.entire - hidden)::text || '}', 'application/json', surroundings
      from (select to_jsonb(r) as entire from old_rows as r offset 0) as c;
  else
    -- PostgreSQL adds the old and the new row of an update together, so equal positions are pairs, whatever
    -- became of the primary key. One thing breaks it: a row that moves to a partition which refuses it.
    if (select count(*) from old_rows) <> (select count(*) from new_rows) then
      raise exception 'an update of % moved rows to a partition whose trigger discarded them', tg_relid::regclass
        using errcode = 'triggered_data_change_violation',
              hint = 'Delete those rows instead, or unwatch the table: old and new rows cannot be paired.';
    end if;
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when cardinality(keys) = 1 then c.entire ->> keys[1]
                  else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n)) end,
             head || c.new::text || ', "old": ' || c.old::text || '}', 'application/json', surroundings
      from (
        select a.entire, a.entire - hidden as new, b.entire - hidden as old
        from (select to_jsonb(r) as entire, row_number() over () as position from new_rows as r) as a
        join (select to_jsonb(r) as entire, row_number() over () as position from old_rows as r) as b
          on b.position = a.position
        order by a.position offset 0
      ) as c
      where c.new <> c.old;
  end if;
  get diagnostics stored = row_count;
  if stored > 0 and bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return null;
end
$$;

-- SECURITY INVOKER: it is the caller's own right to create triggers that decides.
create function bridge.unwatch("table" regclass) returns void
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  name text;
begin
  for name in
    select t.tgname from pg_trigger as t
    where t.tgrelid = "table" and t.tgfoid = 'bridge.capture()'::regprocedure and not t.tgisinternal
  loop
    execute format('drop trigger %I on %s', name, "table");
  end loop;
end
$$;
comment on function bridge.unwatch(regclass) is 'Ends bridge.watch() of a table; does nothing when it is not watched.';

create function bridge.watch(
  "table" regclass, topic text default null, key text default null, columns text[] default null,
  operations text[] default '{insert,update,delete}'
) returns void
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  relation record;
  present text[];
  keys text[];
  operation text;
begin
  if "table" is null then
    raise exception 'the table to watch is null'
      using errcode = 'null_value_not_allowed', hint = 'Give its name: select bridge.watch(''shop.order'').';
  end if;
  select c.relkind, c.relname, n.nspname, pg_has_role(c.relowner, 'USAGE') as owned into strict relation
  from pg_class as c join pg_namespace as n on n.oid = c.relnamespace where c.oid = "table";
  if relation.relkind not in ('r', 'p') then
    raise exception '% is no table', "table"
      using errcode = 'wrong_object_type', hint = 'Tables and partitioned tables can be watched; views and foreign tables cannot.';
  elsif relation.nspname = 'bridge' then
    raise exception 'the tables of schema bridge cannot be watched'
      using errcode = 'wrong_object_type', hint = 'An event about an event would never end.';
  elsif not relation.owned then
    raise exception 'only the owner of % may watch it', "table" using errcode = 'insufficient_privilege';
  end if;

  if topic is not null then
    perform bridge.check_topic(topic);
  end if;
  if operations is null or cardinality(operations) = 0 or array_position(operations, null) is not null
     or not operations <@ array['insert', 'update', 'delete'] then
    raise exception 'the operations to watch are %', coalesce(operations::text, 'null')
      using errcode = 'invalid_parameter_value', hint = 'Give some of insert, update, delete.';
  end if;

  select array_agg(a.attname::text order by a.attnum) into present
  from pg_attribute as a where a.attrelid = "table" and a.attnum > 0 and not a.attisdropped;
  if key is not null then
    keys := array[key];
  else
    select array_agg(a.attname::text order by k.position) into keys
    from pg_index as i
    cross join lateral unnest(i.indkey::int2[]) with ordinality as k(attnum, position)
    join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indrelid = "table" and i.indisprimary and k.position <= i.indnkeyatts;
    if keys is null then
      raise exception '% has no primary key to order its events by', "table"
        using errcode = 'invalid_table_definition',
              hint = format('Add one, or name a column: select bridge.watch(%L, key => ...)', "table");
    end if;
  end if;
  if columns is not null and (cardinality(columns) = 0 or array_position(columns, null) is not null) then
    raise exception 'the columns to watch are %', columns
      using errcode = 'invalid_parameter_value', hint = 'Name at least one, or leave the argument out to watch all.';
  elsif not keys || coalesce(columns, '{}') <@ present then
    raise exception '% has no column %', "table",
        (select string_agg(quote_ident(c), ', ') from unnest(keys || columns) as c where c <> all (present))
      using errcode = 'undefined_column', hint = format('It has %s. Capitals count.', array_to_string(present, ', '));
  end if;

  perform bridge.unwatch("table");
  foreach operation in array array(select distinct unnest(operations)) loop
    execute format(
      'create trigger %I after %s on %s referencing %s for each statement execute function bridge.capture(%L, %L, %L)',
      'bridge_watch_' || operation, operation, "table",
      case operation when 'insert' then 'new table as new_rows'
                     when 'delete' then 'old table as old_rows'
                     else 'new table as new_rows old table as old_rows' end,
      coalesce(topic, format('%s.%s.%s', relation.nspname, relation.relname,
                             case operation when 'delete' then 'deleted' when 'update' then 'updated' else 'inserted' end)),
      keys, coalesce(columns::text, '')
    );
  end loop;
end
$$;
comment on function bridge.watch(regclass, text, text, text[], text[]) is
  'Emits an event for every row that is inserted, updated or deleted; an update that changes no watched column emits none. '
  'Topic: schema.table.inserted, .updated, .deleted. Key: the primary key. Calling it again replaces what it did.';

-- migrations/0004_read.sql ------------------------------------------------------------

-- Reading the log: a mark and its gaps, one leader a name, and the bell.
-- The rules and their reasons: ARCHITECTURE.md, "Reading the log". bridge/sources/outbox.py is the caller.

-- One page: late rows first (those in the gaps), then the rows above the mark, in id order.
-- The first row is no event: its id is the xmin of the very snapshot that looked (STABLE: all queries share it).
-- Planner: estimates on a log that grows by thousands a second are always stale; only the primary key may serve.
create function bridge.read_page(mark bigint, gaps int8multirange, page_size int, page_bytes bigint)
returns table (
    id bigint, event_id text, topic text, key text, payload bytea, content_type text, headers text,
    created_at timestamptz
)
language plpgsql stable
set search_path = pg_catalog, bridge, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
declare
    late record;
    room int := page_size;
    bytes_room bigint := page_bytes;
begin
    id := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    return next;

    -- unnest() gives the gaps in ascending order and a lateral join keeps it. A sort by id would say so formally,
    -- but would fetch every late row of a bulk transaction for each page.
    for late in
        select o.*, octet_length(o.payload) as size
        from unnest(gaps) as gap,
             lateral (select * from bridge.outbox n where n.id >= lower(gap) and n.id < upper(gap)
                      order by n.id limit room) as o
    loop
        id := late.id; event_id := late.event_id::text; topic := late.topic; key := late.key;
        payload := convert_to(late.payload, 'UTF8'); content_type := late.content_type;
        headers := nullif(late.headers, '{}')::text; created_at := late.created_at;
        return next;
        room := room - 1;
        bytes_room := bytes_room - late.size;
        if room <= 0 or bytes_room <= 0 then
            return;
        end if;
    end loop;

    return query
        select o.id, o.event_id::text, o.topic, o.key, convert_to(o.payload, 'UTF8'), o.content_type,
               nullif(o.headers, '{}')::text, o.created_at
        from (
            select n.*, sum(octet_length(n.payload)) over (order by n.id rows unbounded preceding)
                        - octet_length(n.payload) as bytes_before
            from bridge.outbox n where n.id > read_page.mark order by n.id limit room
        ) o
        where o.bytes_before < bytes_room order by o.id;
end $$;

-- Tries to become the one that reads for this name. Never blocks: a lock call that waits would hold a snapshot
-- and stop vacuum. Gives no row while another session leads; otherwise where to go on.
create function bridge.take_lead(bridge_name text, who text)
returns table (mark bigint, gaps int8multirange, horizon bigint)
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
declare
    cluster bigint := (select system_identifier from pg_control_system());
begin
    if not pg_try_advisory_lock(bridge.lead_key(bridge_name)) then
        return;
    end if;
    -- Ids and horizons mean nothing in another cluster (dump and restore, pg_upgrade): the gaps stay, and
    -- wait for a horizon of this one.
    insert into bridge.cursor as c (name, horizon, system_identifier, leader, leader_since)
    values (bridge_name, pg_current_xact_id(), cluster, who, now())
    on conflict (name) do update set
        horizon = case when c.system_identifier = cluster then c.horizon else pg_current_xact_id() end,
        system_identifier = cluster, leader = who, leader_since = now();
    insert into bridge.bell (name, asleep) values (bridge_name, true)
    on conflict (name) do update set asleep = true;
    return query select c.mark, c.gaps, c.horizon::text::bigint from bridge.cursor c where c.name = bridge_name;
end $$;

create function bridge.lead_key(bridge_name text) returns bigint
language sql immutable parallel safe
set search_path = pg_catalog, bridge, pg_temp
as $$ select hashtextextended('pgbridge lead ' || bridge_name, 0) $$;

-- Hands the lead over at once: a standby listens for it.
create function bridge.leave_lead(bridge_name text) returns void
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    update bridge.cursor set leader = null, leader_since = null where name = bridge_name;
    -- Asleep, so that whoever leads next is rung for while it starts.
    update bridge.bell set asleep = true where name = bridge_name and not asleep;
    perform pg_advisory_unlock(bridge.lead_key(bridge_name));
    perform pg_notify('bridge_lead', bridge_name);
end $$;

-- Everything up to this position is settled. The horizon, this transaction's id, was taken after every page that
-- led to these gaps was read, so it may close them.
create function bridge.store_cursor(bridge_name text, settled_mark bigint, settled_gaps int8multirange)
returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$
    update bridge.cursor
    set mark = settled_mark, gaps = settled_gaps, horizon = pg_current_xact_id(), stored_at = clock_timestamp()
    where name = bridge_name
    returning horizon::text::bigint
$$;

-- A horizon, when there is nothing to store. The assigned id makes no write that a commit would wait for.
create function bridge.take_horizon() returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$ select pg_current_xact_id()::text::bigint $$;

create function bridge.set_asleep(bridge_name text, sleeps boolean) returns void
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$ update bridge.bell set asleep = sleeps where name = bridge_name and asleep <> sleeps $$;

-- migrations/0005_inbox.sql ------------------------------------------------------------

-- The workers' ledger: which events a worker has in hand or has finished.
--
-- A worker process holds a session advisory lock on a random token. A claim is alive as long as somebody
-- holds the lock of its token, so a crashed process frees its events the moment PostgreSQL ends its session,
-- and no lease has to run out. `attempts` counts the runs of the handler and, together with the token, fences:
-- whoever lost a claim can no longer finish it.

create table bridge.inbox (
    worker      text        not null,
    event_id    uuid        not null,
    claim       bigint,                                -- token of the process that has it; null: nobody has
    attempts    integer     not null default 1,
    effects     jsonb       not null default '{}',     -- outside effects by operation, see inbox_effect_begin()
    result      jsonb,
    started_at  timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    primary key (worker, event_id)
)
-- Room in the page lets a finish be a HOT update: no index holds what it changes.
with (fillfactor = 80);

create index inbox_started on bridge.inbox (worker, started_at);

-- The functions below keep their plans. One made while the table is nearly empty would scan it, and go on to do so
-- while it grows: hence enable_seqscan = off.

comment on table bridge.inbox is
    'Events that workers have claimed or finished; makes the database effects of a worker exactly-once.';

-- Claims events, and says of each how it stands. A process never asks for one that it has in hand, so a claim under
-- its own token is one whose answer it did not get. Give them in the order of their ids: then no two callers wait for
-- each other. `state` is
--   claimed   it is ours: run it; `attempt` says which run this is
--   finished  it was handled before: acknowledge it
--   busy      a living process has it: come back later
--   unheld    nobody holds the lock of the token that was given: take a new one first
create function bridge.inbox_claim(worker_name text, events uuid[], token bigint)
returns table (event uuid, state text, attempt integer)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    unheld boolean := pg_try_advisory_xact_lock_shared(token);
    finished timestamptz;
begin
    -- A crash of the server that forgets these claims ends the session that holds their token as well; so nobody
    -- need wait for the disk before the handler runs. What finishes or begins an effect does wait.
    perform set_config('synchronous_commit', 'off', true);
    foreach event in array events loop
        attempt := null;
        if unheld then
            state := 'unheld';
            return next;
            continue;
        end if;
        insert into bridge.inbox as i (worker, event_id, claim) values (worker_name, event, token)
        on conflict (worker, event_id) do update set claim = excluded.claim, attempts = i.attempts + 1
            where i.finished_at is null
              and (i.claim is null or i.claim = excluded.claim or pg_try_advisory_xact_lock_shared(i.claim))
        returning i.attempts into attempt;
        if found then
            state := 'claimed';
        else
            select i.finished_at into finished from bridge.inbox i where i.worker = worker_name and i.event_id = event;
            state := case when finished is null then 'busy' else 'finished' end;
        end if;
        return next;
    end loop;
end $$;

-- Finishes a claimed event; false when the claim is no longer ours. Call it in the transaction of the reply.
create function bridge.inbox_finish(worker_name text, event uuid, token bigint, attempt integer, outcome jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set finished_at = clock_timestamp(), result = outcome, claim = null
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- Finishes claimed events of a worker without a reply; the arrays go together, in the order of the ids. Returns those
-- whose claims were still ours.
create function bridge.inbox_finish_all(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[])
returns setof uuid
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
begin
    for n in 1 .. cardinality(events) loop
        if bridge.inbox_finish(worker_name, events[n], tokens[n], attempts[n], outcomes[n]) then
            return next events[n];
        end if;
    end loop;
end $$;

-- Gives a claim up, so that any process may claim the event at once. `counted` is the number of attempts that
-- stay on record: `attempt` after a failure, one less when the handler was not to blame, 0 with a dead letter, so
-- that its replay starts afresh. False when the claim is no longer ours.
create function bridge.inbox_release(worker_name text, event uuid, token bigint, attempt integer, counted integer)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set claim = null, attempts = counted
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- Records that an outside effect is about to happen, before it happens. Returns what is on record of it:
-- {"idempotency_key", "started_at", "result" once it is known}; null when the claim is no longer ours.
-- A second attempt gets the record of the first, so its key and its start never change.
create function bridge.inbox_effect_begin(worker_name text, event uuid, token bigint, attempt integer, operation text)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = jsonb_build_object(operation, jsonb_build_object(
            'idempotency_key', event::text || ':' || operation, 'started_at', clock_timestamp())) || i.effects
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning i.effects -> operation into entry;
    return entry;
end $$;

-- Records what an outside effect gave; false when the claim is no longer ours.
create function bridge.inbox_effect_end(
    worker_name text, event uuid, token bigint, attempt integer, operation text, outcome jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set effects = jsonb_set(i.effects, array[operation, 'result'], outcome)
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null and i.effects ? operation;
    return found;
end $$;

-- Deletes at most `chunk` finished events of a worker that ended before `before`, and returns how many those were.
-- Unfinished ones stay: they are the evidence of what was begun.
create function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000) returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and o.finished_at < before
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- migrations/0006_operate.sql ------------------------------------------------------------

-- What operators do: see how things stand, replay and discard dead letters with an audit, prune the log.

create table bridge.dead_letter_audit (
  id       bigint generated always as identity primary key,
  letter   text not null,
  action   text not null check (action in ('replayed', 'discarded')),
  event_id uuid,
  topic    text,
  code     text,
  failure  text,
  why      text not null default '',
  person   text not null,
  role     text not null default session_user,
  at       timestamptz not null default clock_timestamp()
);
comment on table bridge.dead_letter_audit is
  'Which dead letters were taken away, by whom and why. Without payloads, and never pruned.';
comment on column bridge.dead_letter_audit.letter is 'outbox:<id>, or <worker>:<event id> for one of a queue.';
comment on column bridge.dead_letter_audit.person is 'Who gave the command, as the operating system knows them: user@host.';
comment on column bridge.dead_letter_audit.role is 'The database role of the session that gave it.';

-- Takes letters away and writes down who did; one transaction, so neither stands without the other.
create function bridge.end_dead_letters(letters bigint[], action text, person text, why text) returns bigint
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  ended bigint;
begin
  with gone as (
    delete from bridge.dead_letter d where d.id = any (letters)
    returning d.id, d.event_id, d.topic, d.code, d.reason
  )
  insert into bridge.dead_letter_audit (letter, action, event_id, topic, code, failure, why, person)
    select 'outbox:' || g.id, end_dead_letters.action, g.event_id, g.topic, g.code, g.reason,
           end_dead_letters.why, end_dead_letters.person
    from gone g order by g.id;
  get diagnostics ended = row_count;
  return ended;
end
$$;
comment on function bridge.end_dead_letters(bigint[], text, text, text) is
  'Removes dead letters that were published after all (replayed) or given up (discarded); returns how many.';

create function bridge.refuse_dead_letter(letter bigint, refused_code text, refused_reason text, more_attempts int)
  returns void
  language sql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  update bridge.dead_letter
  set code = refused_code, reason = refused_reason, attempts = attempts + more_attempts, failed_at = clock_timestamp()
  where id = letter
$$;
comment on function bridge.refuse_dead_letter(bigint, text, text, int) is
  'A replay was refused too: the letter stays, with the newest reason.';

-- Letters of the workers' queues leave on the broker, so this only writes down who took them away.
create function bridge.audit_dead_letter(
  letter text, action text, event_id uuid, topic text, code text, failure text, person text, why text) returns void
  language sql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  insert into bridge.dead_letter_audit (letter, action, event_id, topic, code, failure, person, why)
  values (audit_dead_letter.letter, audit_dead_letter.action, audit_dead_letter.event_id, audit_dead_letter.topic,
          audit_dead_letter.code, audit_dead_letter.failure, audit_dead_letter.person, audit_dead_letter.why)
$$;

-- Deletes the settled and old ones among the first `chunk` events above `after`, and says where to go on: below the
-- first event that stayed. Settled means at or below the mark of every bridge, and in no gap where a row may still
-- appear late. It looks at `chunk` rows at most, never for old ones beyond young ones: ids and times rise together.
create function bridge.prune(before timestamptz, chunk int, after bigint, out deleted bigint, out next_after bigint)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  old bigint[];
  first_kept bigint;
  last_seen bigint;
begin
  select array_agg(seen.id) filter (where seen.done), min(seen.id) filter (where not seen.done), max(seen.id)
  into old, first_kept, last_seen
  from (
    select o.id,
           o.created_at < before
           and exists (select from bridge.cursor)
           and not exists (select from bridge.cursor c where o.id > c.mark or o.id <@ c.gaps) as done
    from (select n.id, n.created_at from bridge.outbox n where n.id > after order by n.id limit chunk) o
  ) seen;
  delete from bridge.outbox o where o.id = any (old);
  get diagnostics deleted = row_count;
  -- A row that commits late into a gap must still be found by a later call.
  next_after := least(coalesce(first_kept - 1, last_seen, after), (select min(lower(c.gaps)) - 1 from bridge.cursor c));
end
$$;
comment on function bridge.prune(timestamptz, int, bigint) is
  'Deletes a chunk of events that every bridge has settled and that were recorded before a time.';

-- Where the log comes to a time: the lowest id whose event, and all that follow, were recorded at or after it, as far
-- as ids and times rise together. Twenty-odd looks into the primary key in place of a scan.
create function bridge.position_at(moment timestamptz) returns bigint
  language plpgsql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  low bigint := (select min(id) from bridge.outbox);
  high bigint := (select max(id) + 1 from bridge.outbox);
  middle bigint;
  found_id bigint;
  found_at timestamptz;
begin
  while low < high loop
    middle := low + (high - low) / 2;
    select o.id, o.created_at into found_id, found_at from bridge.outbox o where o.id >= middle order by o.id limit 1;
    if not found or found_at >= moment then
      high := middle;
    else
      low := found_id + 1;
    end if;
  end loop;
  return coalesce(low, 0);
end
$$;

-- How far each bridge is. Events not settled are counted up to a bound, so that a look at a backlog of millions stays
-- cheap; beyond it `backlog` is the distance of ids, which rolled back transactions make a little too large.
create function bridge.status()
  returns table (
    name text, leader text, leader_since timestamptz, leads boolean, mark bigint, last_id bigint, gaps bigint,
    backlog bigint, backlog_exact boolean, oldest_unsent_at timestamptz, stored_at timestamptz, asleep boolean,
    dead_letters bigint
  )
  language plpgsql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  bound constant int := 100000;
  c record;
  late bigint;
  late_at timestamptz;
begin
  last_id := coalesce((select max(o.id) from bridge.outbox o), 0);
  for c in select * from bridge.cursor cu order by cu.name loop
    name := c.name; mark := c.mark; stored_at := c.stored_at;
    gaps := (select coalesce(sum(upper(g) - lower(g)), 0) from unnest(c.gaps) g);
    -- The row says who led last; only the lock says whether that session lives.
    leads := exists (
      select from pg_locks l
      where l.locktype = 'advisory' and l.granted and l.objsubid = 1
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
        and (l.classid::bigint << 32) + l.objid::bigint = bridge.lead_key(c.name));
    leader := case when leads then c.leader end;
    leader_since := case when leads then c.leader_since end;
    asleep := coalesce((select b.asleep from bridge.bell b where b.name = c.name), true);

    select count(*), min(n.created_at) into late, late_at
      from unnest(c.gaps) g,
           lateral (select o.created_at from bridge.outbox o where o.id >= lower(g) and o.id < upper(g)
                    order by o.id limit bound) n;
    backlog := late + (select count(*) from (select from bridge.outbox o where o.id > c.mark limit bound) n);
    backlog_exact := backlog < bound;
    if not backlog_exact then
      backlog := greatest(backlog, last_id - c.mark + late);
    end if;
    oldest_unsent_at := least(late_at, (select n.created_at from (
      select o.created_at from bridge.outbox o where o.id > c.mark order by o.id limit 1) n));
    dead_letters := (select count(*) from bridge.dead_letter d where d.bridge = c.name);
    return next;
  end loop;
end
$$;
comment on function bridge.status() is 'One row a bridge: who leads, how far it is, and what waits.';

-- What in the database endangers the log. Other sessions' start times are seen only by pg_read_all_stats, which the
-- owner of this schema may have or not: hence sees_sessions.
create function bridge.guards(
  out notification_queue_usage double precision, out oldest_transaction_at timestamptz,
  out oldest_transaction text, out sees_sessions boolean, out outbox_bytes bigint, out oldest_event_at timestamptz)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select pg_notification_queue_usage(), holder.since, holder.who,
         pg_has_role('pg_read_all_stats', 'usage'),
         pg_total_relation_size('bridge.outbox'),
         (select o.created_at from bridge.outbox o order by o.id limit 1)
  from (values (1)) one
  left join lateral (
    select * from (
      select a.xact_start as since,
             format('pid %s, role %s, database %s, %s', a.pid, a.usename, a.datname, a.state) as who
      from pg_stat_activity a
      where a.pid <> pg_backend_pid() and (a.backend_xid is not null or a.backend_xmin is not null)
        and a.backend_type <> 'autovacuum worker' and a.xact_start is not null
      union all
      select p.prepared, format('prepared transaction %L, role %s, database %s', p.gid, p.owner, p.database)
      from pg_prepared_xacts p
    ) every order by since limit 1
  ) holder on true
$$;
comment on function bridge.guards() is
  'The oldest transaction or snapshot (it stops vacuum and keeps gaps open), NOTIFY''s queue, and the size of the log.';

-- migrations/0007_positions.sql ------------------------------------------------------------

-- A position for each sink of a bridge, so that none waits for another: how far it has read (mark), what it has not
-- seen below (gaps), and what it has seen and could not publish yet (held). bridge/sources/outbox.py is the caller.

create table bridge.leader (
  name  text primary key,
  who   text,
  since timestamptz not null default now(),
  sinks text[] not null default '{}'
) with (fillfactor = 50);
comment on table bridge.leader is 'Who reads the log for each bridge, host:pid; null after a clean stop. Only the lock says whether it lives.';
comment on column bridge.leader.sinks is
  'The sinks that it has read for: one whose position is missing all the same was not new, and begins at the beginning.';

alter table bridge.cursor
  drop constraint cursor_pkey,
  drop column leader,
  drop column leader_since,
  -- '*': where every sink is, as versions before this one stored it; the next leader makes a row for each sink of it.
  add column sink text not null default '*',
  add column held int8multirange not null default '{}',
  add column patterns text[] not null default '{}',
  add column problem text,
  add column problem_since timestamptz,
  add primary key (name, sink);
alter table bridge.cursor alter column sink drop default;
comment on table bridge.cursor is
  'How far each sink of each bridge is: all up to mark is settled, but for gaps (not seen) and held (seen, not settled).';
comment on column bridge.cursor.sink is 'The sink''s name; empty for the position that finds events without a route.';
comment on column bridge.cursor.patterns is 'The topics that were read for it; for the empty sink, those that were not.';
comment on column bridge.cursor.problem is 'Why the sink is behind, in words; null while nothing is wrong.';

drop function bridge.take_lead(text, text);
drop function bridge.leave_lead(text);
drop function bridge.store_cursor(text, bigint, int8multirange);
drop function bridge.read_page(bigint, int8multirange, int, bigint);
drop function bridge.prune(timestamptz, int, bigint);
drop function bridge.status();

-- The patterns of routes (as in AMQP: * is one word, # any number of words) as one regular expression for '.' || topic:
-- with a dot before every word, no word is special.
create function bridge.topic_regex(patterns text[]) returns text
language sql immutable parallel safe
set search_path = pg_catalog, bridge, pg_temp
as $$
    select '^(?:' || string_agg(one.regex, '|') || ')$'
    from unnest(patterns) as p (pattern),
         lateral (
             select string_agg(
                 case word
                     when '*' then '\.[^.]*'
                     when '#' then '(?:\.[^.]*)*'
                     else '\.' || regexp_replace(word, '([][\\^$.|?*+(){}])', '\\\1', 'g')
                 end, '' order by place) as regex
             from regexp_split_to_table(pattern, '\.') with ordinality as w (word, place)
         ) as one
$$;
comment on function bridge.topic_regex(text[]) is
  'A regular expression that takes ''.'' || topic if one of the patterns takes the topic; null for no patterns.';

-- One page: late rows first (those in the gaps), then the rows above the mark, in id order. Rows that the reader does
-- not take have only their id: it must know that it has seen them. A last row with the id -1 says that there was no
-- room to look into every gap. The reader takes the topics that `patterns` take
-- (null: all), or with `inverted` all others. The first row is no event: its id is the xmin of the very snapshot that
-- looked (STABLE: all queries share it).
-- What a row becomes on the way, header_texts() and calendar_time(), is in 0008.
-- Planner: estimates on a log that grows by thousands a second are always stale; only the primary key may serve.
create function bridge.read_page(
    mark bigint, gaps int8multirange, page_size int, page_bytes bigint, patterns text[], inverted boolean)
returns table (
    id bigint, event_id text, topic text, key text, payload bytea, content_type text, headers text,
    created_at timestamptz
)
language plpgsql stable
set search_path = pg_catalog, bridge, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
declare
    late record;
    room int := page_size;
    bytes_room bigint := page_bytes;
    taken constant text := bridge.topic_regex(patterns);
begin
    id := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    return next;

    -- unnest() gives the gaps in ascending order and a lateral join keeps it. A sort by id would say so formally,
    -- but would fetch every late row of a bulk transaction for each page.
    for late in
        select o.*
        from unnest(gaps) as gap,
             lateral (select * from bridge.outbox n where n.id >= lower(gap) and n.id < upper(gap)
                      order by n.id limit room) as o
    loop
        id := late.id;
        if taken is null or (('.' || late.topic) ~ taken) <> inverted then
            event_id := late.event_id::text; topic := late.topic; key := late.key;
            payload := convert_to(late.payload, 'UTF8'); content_type := late.content_type;
            headers := bridge.header_texts(late.headers);
            created_at := bridge.calendar_time(late.created_at);
            bytes_room := bytes_room - bridge.event_bytes(late.payload, late.key, late.headers);
        else
            event_id := null; topic := null; key := null; payload := null; content_type := null; headers := null;
            created_at := null;
        end if;
        return next;
        room := room - 1;
        if room <= 0 or bytes_room <= 0 then
            -- There may be more in the gaps: none of them can be closed by this look.
            id := -1;
            return next;
            return;
        end if;
    end loop;

    if taken is null then
        return query
            select o.id, o.event_id::text, o.topic, o.key, convert_to(o.payload, 'UTF8'), o.content_type,
                   bridge.header_texts(o.headers), bridge.calendar_time(o.created_at)
            from (
                select n.*, sum(n.size) over (order by n.id rows unbounded preceding) - n.size as bytes_before
                from (
                    select m.*, bridge.event_bytes(m.payload, m.key, m.headers) as size
                    from bridge.outbox m where m.id > read_page.mark order by m.id limit room
                ) n
            ) o
            where o.bytes_before < bytes_room order by o.id;
        return;
    end if;
    return query
        select o.id,
               case when o.is_taken then o.event_id::text end, case when o.is_taken then o.topic end,
               case when o.is_taken then o.key end, case when o.is_taken then convert_to(o.payload, 'UTF8') end,
               case when o.is_taken then o.content_type end, case when o.is_taken then bridge.header_texts(o.headers) end,
               case when o.is_taken then bridge.calendar_time(o.created_at) end
        from (
            select n.*, sum(n.size) over (order by n.id rows unbounded preceding) - n.size as bytes_before
            from (
                select t.*, case when t.is_taken then bridge.event_bytes(t.payload, t.key, t.headers) else 0 end as size
                from (
                    select m.*, (('.' || m.topic) ~ taken) <> inverted as is_taken
                    from bridge.outbox m where m.id > read_page.mark order by m.id limit room
                ) t
            ) n
        ) o
        where o.bytes_before < bytes_room order by o.id;
end $$;

-- What an event weighs in the memory of whoever reads it.
create function bridge.event_bytes(payload text, key text, headers jsonb) returns int
language sql immutable parallel safe
return octet_length(payload) + coalesce(octet_length(key), 0)
       + case when headers = '{}' then 0 else octet_length(headers::text) end;

-- All below it is settled for this sink.
create function bridge.floor_of(mark bigint, gaps int8multirange, held int8multirange) returns bigint
language sql immutable parallel safe
return least(mark, lower(gaps) - 1, lower(held) - 1);

-- Tries to become the one that reads for this name. Never blocks: a lock call that waits would hold a snapshot
-- and stop vacuum. False while another session leads.
create function bridge.take_lead(bridge_name text, leader_name text) returns boolean
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    if not pg_try_advisory_lock(bridge.lead_key(bridge_name)) then
        return false;
    end if;
    insert into bridge.leader as l (name, who, since) values (bridge_name, leader_name, now())
    on conflict (name) do update set who = excluded.who, since = excluded.since;
    insert into bridge.bell as b (name, asleep) values (bridge_name, true)
    on conflict (name) do update set asleep = true;
    return true;
end $$;

-- Where each reader of the leader goes on, and why there.
-- `readers`: [{"sink": ..., "patterns": [...], "start": "now", "beginning" or null}, ...]. The sink '' takes what no
-- pattern takes.
create function bridge.begin_reading(bridge_name text, readers jsonb)
returns table (sink text, mark bigint, gaps int8multirange, horizon bigint, held bigint, began text)
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
#variable_conflict use_column
declare
    cluster constant bigint := (select system_identifier from pg_control_system());
    last_id constant bigint := coalesce(pg_sequence_last_value('bridge.outbox_id_seq'), 0);
    is_known boolean;
    had_sinks constant text[] := (select l.sinks from bridge.leader l where l.name = bridge_name);
    named text[];
    reader record;
    c bridge.cursor;
    lowest bigint;
begin
    named := array(select r ->> 'sink' from jsonb_array_elements(readers) r);
    insert into bridge.cursor (name, sink, mark, gaps, horizon, system_identifier, patterns)
    select c0.name, r ->> 'sink', c0.mark, c0.gaps, c0.horizon, c0.system_identifier,
           array(select jsonb_array_elements_text(r -> 'patterns'))
    from bridge.cursor c0, jsonb_array_elements(readers) r
    where c0.name = bridge_name and c0.sink = '*'
    on conflict do nothing;
    delete from bridge.cursor c0 where c0.name = bridge_name and c0.sink = '*' and cardinality(named) > 0;
    -- Where some route takes everything, or what none takes is dropped, nobody looks for events without a route.
    delete from bridge.cursor c0 where c0.name = bridge_name and c0.sink = '' and not '' = any (named);
    is_known := exists (select from bridge.cursor c0 where c0.name = bridge_name);

    for reader in
        select r ->> 'sink' as sink, array(select jsonb_array_elements_text(r -> 'patterns')) as patterns,
               r ->> 'start' as start
        from jsonb_array_elements(readers) r
    loop
        select * into c from bridge.cursor c0 where c0.name = bridge_name and c0.sink = reader.sink;
        if not found then
            c.mark := 0; c.gaps := '{}'; c.held := '{}'; c.horizon := pg_current_xact_id();
            lowest := (select min(bridge.floor_of(o.mark, o.gaps, o.held)) from bridge.cursor o
                       where o.name = bridge_name and (reader.sink = '') = (o.sink = any (named)));
            began := case
                when reader.sink = '' then 'routes'
                -- Somebody removed its position by hand: what it had not published is not known any more.
                when reader.sink = any (had_sinks) then 'removed'
                when reader.start is not null then reader.start
                -- A sink that has another name now goes on where it was.
                when lowest is not null then 'renamed'
                when is_known then 'now'
                else 'beginning'
            end;
            if began in ('routes', 'renamed') then
                c.mark := coalesce(lowest, 0);
            elsif began = 'now' then
                c.mark := coalesce((select max(o.id) from bridge.outbox o), 0);
                -- What was recorded before and commits from now on belongs to it.
                c.gaps := coalesce((
                    select range_agg(int8range(i, i + 1)) from generate_series(greatest(1, c.mark - 10000), c.mark) i
                    where not exists (select from bridge.outbox o where o.id = i)), '{}');
            end if;
        else
            began := 'stored';
            if c.system_identifier <> cluster then
                -- Ids and horizons mean nothing in another cluster (dump and restore, pg_upgrade): the gaps stay, and
                -- wait for a horizon of this one.
                c.horizon := pg_current_xact_id();
            end if;
            if c.mark > last_id then
                -- The log was emptied and its numbers begin again: all that it holds is new.
                began := 'restarted';
                c.mark := 0; c.gaps := '{}'; c.held := '{}';
            elsif (reader.sink = '' and not c.patterns <@ reader.patterns)
               or (reader.sink <> '' and not reader.patterns <@ c.patterns) then
                -- A topic that comes from another sink may not have been published there yet.
                lowest := (select min(bridge.floor_of(o.mark, o.gaps, o.held)) from bridge.cursor o
                           where o.name = bridge_name and (reader.sink <> '' or o.sink = any (named)));
                if lowest < c.mark then
                    began := 'routes';
                    c.gaps := c.gaps + int8multirange(int8range(lowest + 1, c.mark + 1));
                    c.horizon := pg_current_xact_id();
                end if;
            end if;
        end if;
        insert into bridge.cursor as o (name, sink, mark, gaps, held, horizon, system_identifier, patterns)
        values (bridge_name, reader.sink, c.mark, c.gaps, c.held, c.horizon, cluster, reader.patterns)
        on conflict (name, sink) do update set
            mark = excluded.mark, gaps = excluded.gaps, held = excluded.held, horizon = excluded.horizon,
            system_identifier = cluster, patterns = excluded.patterns, problem = null, problem_since = null;
        sink := reader.sink;
        mark := c.mark;
        -- What was held is read again like what was never seen: by its id, before all that follows in its key.
        gaps := c.gaps + c.held;
        held := (select coalesce(sum(upper(r) - lower(r)), 0) from unnest(c.held) r);
        horizon := c.horizon::text::bigint;
        return next;
    end loop;
    update bridge.leader l
    set sinks = array(select distinct s from unnest(l.sinks || named) s where s <> '' order by s)
    where l.name = bridge_name;
end $$;

-- Hands the lead over at once: a standby listens for it. Awake, since nobody would hear a bell now; whoever leads next
-- looks at once.
create function bridge.leave_lead(bridge_name text) returns void
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    update bridge.leader set who = null, since = now() where name = bridge_name;
    update bridge.bell set asleep = false where name = bridge_name and asleep;
    perform pg_advisory_unlock(bridge.lead_key(bridge_name));
    perform pg_notify('bridge_lead', bridge_name);
end $$;

-- Everything up to this position is settled, but for what is held (null: as it was). The horizon, this transaction's
-- id, was taken after every page that led to these gaps was read, so it may close them. No row: somebody removed the
-- position.
create function bridge.store_cursor(
    bridge_name text, sink_name text, settled_mark bigint, settled_gaps int8multirange, now_held int8multirange)
returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$
    update bridge.cursor
    set mark = settled_mark, gaps = settled_gaps, held = coalesce(now_held, held), horizon = pg_current_xact_id(),
        stored_at = clock_timestamp()
    where name = bridge_name and sink = sink_name
    returning horizon::text::bigint
$$;

-- Why a sink is behind, for whoever asks the database; null when nothing is wrong.
create function bridge.store_problem(bridge_name text, sink_name text, words text, seconds double precision) returns void
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$
    update bridge.cursor
    set problem = words, problem_since = clock_timestamp() - make_interval(secs => seconds)
    where name = bridge_name and sink = sink_name and problem is distinct from words
$$;

-- Where the sequence is, and the highest id of the log: a sequence behind it hands out ids that nobody looks for.
create function bridge.sequence_state(out last_value bigint, out last_id bigint)
language sql stable
set search_path = pg_catalog, bridge, pg_temp
as $$
    select coalesce(pg_sequence_last_value('bridge.outbox_id_seq'), 0),
           coalesce((select max(o.id) from bridge.outbox o), 0)
$$;

-- Deletes the settled and old ones among the first `chunk` events above `after`, and says where to go on: below the
-- first event that stayed. Settled means at or below the mark of every position, in no gap where a row may still
-- appear late, and not held. It looks at `chunk` rows at most, never for old ones beyond young ones: ids and times rise
-- together.
create function bridge.prune(before timestamptz, chunk int, after bigint, out deleted bigint, out next_after bigint)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  old bigint[];
  first_kept bigint;
  last_seen bigint;
begin
  select array_agg(seen.id) filter (where seen.done), min(seen.id) filter (where not seen.done), max(seen.id)
  into old, first_kept, last_seen
  from (
    select o.id,
           o.created_at < before
           and exists (select from bridge.cursor)
           and not exists (
             select from bridge.cursor c where o.id > c.mark or o.id <@ c.gaps or o.id <@ c.held) as done
    from (select n.id, n.created_at from bridge.outbox n where n.id > after order by n.id limit chunk) o
  ) seen;
  delete from bridge.outbox o where o.id = any (old);
  get diagnostics deleted = row_count;
  -- A row that commits late into a gap must still be found by a later call.
  next_after := least(coalesce(first_kept - 1, last_seen, after),
                      (select min(bridge.floor_of(c.mark, c.gaps, c.held)) from bridge.cursor c
                       where c.gaps <> '{}' or c.held <> '{}'));
end
$$;
comment on function bridge.prune(timestamptz, int, bigint) is
  'Deletes a chunk of events that every sink of every bridge has settled and that were recorded before a time.';

-- How far each sink of each bridge is. Events not settled are counted up to a bound, so that a look at a backlog of
-- millions stays cheap; beyond it `backlog` is the distance of ids, which rolled back transactions, and topics that
-- the sink does not take, make too large.
create function bridge.status()
  returns table (
    name text, sink text, leader text, leader_since timestamptz, leads boolean, mark bigint, last_id bigint,
    gaps bigint, held bigint, backlog bigint, backlog_exact boolean, oldest_unsent_at timestamptz,
    stored_at timestamptz, asleep boolean, problem text, problem_since timestamptz, dead_letters bigint
  )
  language plpgsql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  bound constant int := 100000;
  c record;
  taken text;
  inverted boolean;
  late bigint;
  late_at timestamptz;
  ahead bigint;
  ahead_at timestamptz;
  seen bigint;
begin
  last_id := coalesce((select max(o.id) from bridge.outbox o), 0);
  for c in
    select cu.*, l.who, l.since from bridge.cursor cu left join bridge.leader l on l.name = cu.name
    order by cu.name, cu.sink
  loop
    name := c.name; sink := c.sink; mark := c.mark; stored_at := c.stored_at;
    gaps := (select coalesce(sum(upper(g) - lower(g)), 0) from unnest(c.gaps) g);
    held := (select coalesce(sum(upper(h) - lower(h)), 0) from unnest(c.held) h);
    -- The row says who led last; only the lock says whether that session lives.
    leads := exists (
      select from pg_locks l
      where l.locktype = 'advisory' and l.granted and l.objsubid = 1
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
        and (l.classid::bigint << 32) + l.objid::bigint = bridge.lead_key(c.name));
    leader := case when leads then c.who end;
    leader_since := case when leads then c.since end;
    asleep := coalesce((select b.asleep from bridge.bell b where b.name = c.name), true);
    problem := case when leads then c.problem end;
    problem_since := case when leads then c.problem_since end;

    taken := bridge.topic_regex(c.patterns);
    inverted := c.sink = '';
    select count(*), min(n.created_at) into late, late_at
      from unnest(c.gaps + c.held) g,
           lateral (select o.created_at, o.topic from bridge.outbox o where o.id >= lower(g) and o.id < upper(g)
                    order by o.id limit bound) n
      where taken is null or (('.' || n.topic) ~ taken) <> inverted;
    select count(*) filter (where n.is_taken), min(n.created_at) filter (where n.is_taken), count(*)
      into ahead, ahead_at, seen
      from (select o.created_at, taken is null or (('.' || o.topic) ~ taken) <> inverted as is_taken
            from bridge.outbox o where o.id > c.mark order by o.id limit bound) n;
    backlog := late + ahead;
    backlog_exact := seen < bound and late < bound;
    if not backlog_exact then
      backlog := greatest(backlog, last_id - c.mark + late);
    end if;
    oldest_unsent_at := bridge.calendar_time(least(late_at, ahead_at));
    dead_letters := (select count(*) from bridge.dead_letter d where d.bridge = c.name);
    return next;
  end loop;
end
$$;
comment on function bridge.status() is 'One row for each sink of each bridge: who leads, how far it is, what waits and why.';

-- Moving and removing positions, by a person. Not under a bridge that reads: it would store its own over it.
create function bridge.require_no_leader(bridge_name text) returns void
language plpgsql volatile
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    if not pg_try_advisory_xact_lock(bridge.lead_key(bridge_name)) then
        raise exception 'the bridge % is running, and would go on from where it is', quote_literal(bridge_name)
            using errcode = 'object_in_use', hint = 'Stop every process of this bridge first.';
    end if;
end $$;

create function bridge.set_position(bridge_name text, sink_name text, to_mark bigint) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    perform bridge.require_no_leader(bridge_name);
    update bridge.cursor c
    set mark = to_mark, gaps = '{}', held = '{}', horizon = pg_current_xact_id(), stored_at = clock_timestamp()
    where c.name = bridge_name and c.sink = sink_name;
    return found;
end $$;
comment on function bridge.set_position(text, text, bigint) is
  'Moves a sink''s position: all up to this id counts as settled, all above it is published (again). False: there is none.';

create function bridge.forget_position(bridge_name text, sink_name text) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    perform bridge.require_no_leader(bridge_name);
    delete from bridge.cursor c where c.name = bridge_name and c.sink = sink_name;
    if not found then
        return false;
    end if;
    update bridge.leader l set sinks = array_remove(l.sinks, sink_name) where l.name = bridge_name;
    if not exists (select from bridge.cursor c where c.name = bridge_name) then
        -- Nobody will read for it any more, so nobody needs to be rung for.
        delete from bridge.leader l where l.name = bridge_name;
        delete from bridge.bell b where b.name = bridge_name;
    end if;
    return true;
end $$;
comment on function bridge.forget_position(text, text) is
  'Removes a sink''s position: it no longer keeps events from being pruned. False: there is none.';

-- What the sink of a position takes of the ids in a range, up to a bound: what a move of the position means.
create function bridge.events_between(bridge_name text, sink_name text, after_id bigint, up_to bigint, bound int)
returns bigint
language sql stable security definer
set search_path = pg_catalog, bridge, pg_temp
as $$
    select count(*) filter (
        where c.taken is null or (('.' || o.topic) ~ c.taken) <> (sink_name = ''))
    from (select bridge.topic_regex(patterns) as taken from bridge.cursor where name = bridge_name and sink = sink_name) c,
         lateral (select n.topic from bridge.outbox n where n.id > after_id and n.id <= up_to order by n.id limit bound) o
$$;

-- migrations/0008_limits.sql ------------------------------------------------------------

-- What an event may hold. Whatever emit() takes, every broker's client can be given: what cannot travel is raised here,
-- in the author's transaction. Headers become text here, so that nothing behind it parses what an author wrote.

-- The planner puts these numbers in the place of the calls.
create function bridge.key_limit() returns int language sql immutable parallel safe return 1024;
comment on function bridge.key_limit() is 'Most bytes of a key: the longest ordering key of Pub/Sub.';
create function bridge.headers_limit() returns int language sql immutable parallel safe return 16384;
comment on function bridge.headers_limit() is 'Most bytes of names and values of an event''s headers, with context.';

-- Headers as they travel: the text of a JSON object whose values are all strings. Null for none.
--
-- Rows that emit() wrote before this migration, and rows inserted by hand, may hold any JSON: a number of a million
-- digits, arrays in arrays. Their values become their JSON text; null is left out, and so is what is not an object.
create function bridge.any_header_texts(headers jsonb) returns text
  language sql immutable parallel safe
  return (
    select jsonb_object_agg(h.key, h.value)::text
    from jsonb_each_text(case jsonb_typeof(headers) when 'object' then headers else '{}' end) as h
    where h.value is not null
  );

-- Apart from the function above, so that the planner can put this body in the place of its call: for rows whose values
-- are strings already, that is a seventh of the cost.
create function bridge.header_texts(headers jsonb) returns text
  language sql immutable parallel safe
  return case
    when headers = '{}' then null
    -- Strict: lax mode would look at the elements of an array in place of the array.
    when jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")', '{}', true) is false
      and jsonb_typeof(headers) = 'object' then headers::text
    else bridge.any_header_texts(headers)
  end;
comment on function bridge.header_texts(jsonb) is
  'The headers of a row of outbox or dead_letter as the text of a JSON object of strings; null when there are none.';

-- A time as every program's calendar has it, of the years 1 to 9999 in any time zone: emit() writes no other, but rows
-- made by hand may hold infinity, or a year before Christ.
create function bridge.calendar_time(at timestamptz) returns timestamptz
  language sql immutable parallel safe
  -- Null stays null: greatest() and least() would pass it over.
  return case when at is not null then
    greatest(least(at, timestamptz '9999-12-30 00:00+00'), timestamptz '0001-01-02 00:00+00') end;

-- Bytes that the names and values of headers take together.
create function bridge.headers_size(headers jsonb) returns bigint
  language sql immutable parallel safe
  return (select coalesce(sum(octet_length(h.key) + octet_length(h.value)), 0) from jsonb_each_text(headers) as h);

-- Whether a name among these headers is not legal, or means something to a broker or to the bridge itself. In any case
-- of letters only where a program on the way ignores the case, since cc and status are words that people use.
--   RabbitMQ  CC and BCC are further routing keys, and end the channel unless they are arrays; x-death and the like
--             count deliveries; x-stream- and x-received-from are read by streams and federation.
--   NATS      Nats- commands JetStream; Status and Description make an answer of the server's.
--   Pub/Sub   refuses names that begin with goog, and marks dead letters with CloudPubSubDeadLetterSource.
--   pgbridge  writes the attributes of CloudEvents, content-type, replayed, and the marks of dead letters.
-- Every emit() with headers pays for this: without a query, and with few alternatives in one regular expression.
create function bridge.has_bad_header_name(headers jsonb) returns boolean
  language sql immutable parallel safe
  return headers ?| array['CC', 'BCC', 'Status', 'Description', 'replayed', 'x-death', 'x-delivery-count',
                          'x-acquired-count', 'x-match', 'x-received-from']
    or jsonb_path_exists(headers, 'strict $.keyvalue() ? (
         @.key like_regex "^$|[^!-9;-~]|.{129}"
         || @.key like_regex "^(ce-|cloudevents|content-type$|nats-|(x-)?pgbridge-)" flag "i"
         || @.key like_regex "^(goog|CloudPubSub|x-(first-death|last-death|opt|stream)-|x-shovelled)")');

-- Headers that are stored as they are: an object of texts, with good names, within the limit.
create function bridge.are_plain_headers(headers jsonb) returns boolean
  language sql immutable parallel safe
  return jsonb_typeof(headers) = 'object'
     and not jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")')
     -- JSON text is never shorter than what it holds, so most need not be measured.
     and octet_length(headers::text) <= bridge.headers_limit()
     and not bridge.has_bad_header_name(headers);

-- Raises what is wrong with an author's headers; returns them as texts. What is null is left out: jsonb_build_object()
-- writes null for a variable that holds nothing, and no broker's header can say so. An actor may be an object, as in
-- the setting bridge.actor. Only check_event() calls this, and has fixed the search_path for both.
drop function bridge.check_headers(jsonb);
create function bridge.check_headers(headers jsonb) returns jsonb
  language plpgsql immutable
as $$
declare
  name text;
begin
  if jsonb_typeof(headers) <> 'object' then
    raise exception 'the headers of an event are a JSON %, not an object', jsonb_typeof(headers)
      using errcode = 'invalid_parameter_value', hint = 'Give an object, such as {"tenant": "acme"}.';
  end if;

  if bridge.has_bad_header_name(headers) then
    select k into name from jsonb_object_keys(headers) as k
      where bridge.has_bad_header_name(jsonb_build_object(k, '')) limit 1;
    if name ~ '^[!-9;-~]{1,128}$' then
      raise exception 'the header name % is reserved', quote_ident(name)
        using errcode = 'reserved_name',
              hint = 'Choose another: to a broker, or to pgbridge itself, this one has a meaning of its own.';
    end if;
    raise exception 'the header name % is not legal', quote_ident(left(name, 128))
      using errcode = 'invalid_parameter_value',
            hint = 'Use 1 to 128 visible ASCII characters without spaces and colons: what every broker can carry.';
  end if;

  if jsonb_path_exists(headers - 'actor', 'strict $.* ? (@.type() == "array" || @.type() == "object")')
     or jsonb_typeof(headers -> 'actor') = 'array'
     or jsonb_typeof(headers -> 'actor') = 'object'
        and jsonb_path_exists(headers -> 'actor', 'strict $.* ? (@.type() == "array" || @.type() == "object")') then
    select h.key into name from jsonb_each(headers) as h where jsonb_typeof(h.value) in ('array', 'object')
      order by h.key = 'actor' limit 1;
    raise exception 'the header % is a JSON %', quote_ident(name), jsonb_typeof(headers -> name)
      using errcode = 'invalid_parameter_value',
            hint = 'Give a string, a number or a boolean; put what has parts into the payload.';
  end if;
  if jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")') then
    select coalesce(jsonb_object_agg(h.key, h.value), '{}') into headers
      from jsonb_each_text(headers) as h where h.value is not null;
  end if;

  if octet_length(headers::text) > bridge.headers_limit() and bridge.headers_size(headers) > bridge.headers_limit() then
    raise exception 'the headers of an event have % bytes in names and values; % are allowed',
        bridge.headers_size(headers), bridge.headers_limit()
      using errcode = 'invalid_parameter_value', hint = 'Put what is large into the payload.';
  end if;
  return headers;
end
$$;

drop function bridge.check_event(text, text, jsonb);
-- Raises what is wrong with an event; returns its headers as texts.
create function bridge.check_event(topic text, payload text, key text, headers jsonb) returns jsonb
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  perform bridge.check_topic(topic);
  if payload is null then
    raise exception 'the payload of an event of topic % is null', quote_literal(topic)
      using errcode = 'null_value_not_allowed',
            hint = 'Give a value; the JSON value null is written ''null''::jsonb.';
  elsif octet_length(key) > bridge.key_limit() then
    raise exception 'the key of an event of topic % has % bytes; % are allowed',
        quote_literal(topic), octet_length(key), bridge.key_limit()
      using errcode = 'invalid_parameter_value',
            hint = 'The key names what events keep their order for, such as an order''s number. '
                   'Give md5(key) for a long one.';
  elsif headers is null or headers = '{}' then
    return '{}';
  end if;
  return bridge.check_headers(headers);
end
$$;

-- What makes an event with a plain topic, a short key, a payload and plain headers, or none, take the short way.
create function bridge.needs_check(topic text, payload text, key text, headers jsonb) returns boolean
  language sql immutable
  return topic is null or topic = '' or octet_length(topic) > 255 or payload is null
      or headers is null or headers <> '{}' and not bridge.are_plain_headers(headers)
      or octet_length(key) > bridge.key_limit();

-- traceparent and actor, as before, as texts. What a client's request brings may break no transaction and no delivery:
-- an actor that is longer than what every broker takes is left out, and one from bridge.actor is raised.
create or replace function bridge.context() returns jsonb
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  -- W3C Trace Context, 3.2: version-trace id-parent id-flags; zero ids and version ff are invalid.
  traceparent_form constant text := '^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$';
  -- Bytes: the longest value of an attribute of Pub/Sub.
  longest_actor constant int := 1024;
  traceparent text := nullif(current_setting('bridge.traceparent', true), '');
  setting text := nullif(current_setting('bridge.actor', true), '');
  given jsonb;
  actor text;
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
    given := bridge.json_object(setting);
    if given ->> 'sub' is null and given ->> 'role' is null then
      raise exception 'the setting bridge.actor is no JSON object with sub or role'
        using errcode = 'invalid_parameter_value', hint = 'It looks like {"sub": "user-1", "role": "clerk"}.';
    end if;
  elsif nullif(current_setting('request.jwt.claims', true), '') is not null then
    given := bridge.json_object(current_setting('request.jwt.claims'));
  end if;
  actor := nullif(jsonb_strip_nulls(jsonb_build_object('sub', given ->> 'sub', 'role', given ->> 'role')), '{}')::text;
  if octet_length(actor) > longest_actor then
    if setting is not null then
      raise exception 'the actor in the setting bridge.actor has % bytes; % are allowed',
          octet_length(actor), longest_actor
        using errcode = 'invalid_parameter_value',
              hint = 'Give an identifier as sub, and put details into the payload.';
    end if;
    actor := null;
  end if;

  return jsonb_strip_nulls(jsonb_build_object('traceparent', traceparent, 'actor', actor));
end
$$;
comment on function bridge.context() is
  'traceparent and actor, from bridge.traceparent and bridge.actor or else from PostgREST''s request settings.';

create or replace function bridge.json_object(value text) returns jsonb
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  return case when jsonb_typeof(value::jsonb) = 'object' then value::jsonb end;
exception when data_exception or program_limit_exceeded then
  -- Not JSON, nothing that jsonb can hold, or nested more deeply than the server's stack allows.
  return null;
end
$$;

-- The author's headers win. What a client's request brings gives way to the limit, the author's own settings do not.
create or replace function bridge.add_context(headers jsonb) returns jsonb
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  surroundings jsonb := bridge.context();
begin
  -- The text holds every name and value, so this is quick to say of nearly all.
  if octet_length((surroundings || headers)::text) <= bridge.headers_limit() then
    return surroundings || headers;
  end if;
  if bridge.headers_size(surroundings || headers) > bridge.headers_limit()
     and coalesce(current_setting('bridge.actor', true), '') = '' then
    surroundings := surroundings - 'actor';
  end if;
  if bridge.headers_size(surroundings || headers) > bridge.headers_limit()
     and coalesce(current_setting('bridge.traceparent', true), '') = '' then
    surroundings := surroundings - 'traceparent';
  end if;
  if bridge.headers_size(surroundings || headers) > bridge.headers_limit() then
    raise exception 'with bridge.actor and bridge.traceparent the headers of an event have % bytes in names and '
                    'values; % are allowed', bridge.headers_size(surroundings || headers), bridge.headers_limit()
      using errcode = 'invalid_parameter_value', hint = 'Put what is large into the payload.';
  end if;
  return surroundings || headers;
end
$$;

-- As 0002 made it, and the key is checked too. It has no SET search_path, for the cost of that (see there): so no
-- operator, cast or unqualified name stands in this body.
create or replace function bridge.append_event(topic text, payload text, content_type text, key text, headers jsonb)
  returns uuid
  language plpgsql volatile security definer
as $$
declare
  event pg_catalog.uuid := pg_catalog.gen_random_uuid();
  own_xid pg_catalog.xid8;
  next_id pg_catalog.int8;
begin
  if bridge.needs_check(topic, payload, key, headers) then
    headers := bridge.check_event(topic, payload, key, headers);
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
drop function bridge.needs_check(text, text, jsonb);
comment on function bridge.append_event(text, text, text, text, jsonb) is
  'What emit() and notify() come down to. Explicit headers win over those of context().';

-- The key of a watched table's event comes from a row, so it is the row's writer who is told.
create function bridge.refuse_watched_key(key text, watched regclass) returns text
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  raise exception 'the key of an event of the watched table % has % bytes; % are allowed',
      watched, octet_length(key), bridge.key_limit()
    using errcode = 'invalid_parameter_value',
          hint = format('Order its events by a shorter column: select bridge.watch(%L, key => ...); or end it: '
                        'select bridge.unwatch(%L).', watched, watched);
end
$$;

-- As 0003 made it, but that a key's length is checked, and a column that is gone is named.
create or replace function bridge.capture() returns trigger
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- The plan that is cached for one row must not join 100,000 pairs by nested loops, nor be compiled for its cost.
  set enable_nestloop = off
  set jit = off
as $$
declare
  keys text[] := tg_argv[1];
  watched text[] := nullif(tg_argv[2], '');
  hidden text[] := '{}';
  present text[];
  own_types boolean;
  head text := format('{"operation": %s, "schema": %s, "table": %s, "new": ',
                      to_json(lower(tg_op)), to_json(tg_table_schema), to_json(tg_table_name));
  surroundings jsonb := case when bridge.has_context() then bridge.context() else '{}' end;
  own_xid xid8;
  stored bigint;
begin
  select array_agg(a.attname::text), bool_or(a.atttypid >= 16384) into present, own_types
  from pg_trigger as t
  join pg_attribute as a on a.attrelid = t.tgrelid and a.attnum > 0 and not a.attisdropped
  where t.tgrelid = tg_relid and t.tgname = tg_name and tg_level = 'STATEMENT'
    and (tg_op = 'DELETE' or t.tgnewtable = 'new_rows') and (tg_op = 'INSERT' or t.tgoldtable = 'old_rows');
  if present is null then
    raise exception 'bridge.capture() serves no trigger but those of bridge.watch()'
      using errcode = 'trigger_protocol_violated', hint = format('select bridge.watch(%L)', tg_relid::regclass);
  end if;
  if own_types and exists (
    select from pg_cast as c join pg_proc as f on f.oid = c.castfunc join pg_roles as r on r.oid = f.proowner
    where c.casttarget in ('json'::regtype, 'jsonb'::regtype) and c.castsource >= 16384
      and not r.rolsuper and r.rolname <> current_user
  ) then
    raise exception 'a cast to json made by a role other than % stands in the way of bridge.watch()', current_user
      using errcode = 'insufficient_privilege',
            hint = 'It would run with that role''s rights. Drop it, give its function to that role, '
                   'or unwatch the table.';
  end if;
  if not (keys || coalesce(watched, '{}')) <@ present then
    raise exception 'bridge.watch() was told of the column %, which % no longer has',
        (select string_agg(quote_ident(c), ', ') from unnest(keys || watched) as c where c <> all (present)),
        tg_relid::regclass
      using errcode = 'undefined_column',
            hint = format('It was renamed or dropped. Watch the table again, with the topic, key and columns that are '
                          'wanted now: select bridge.watch(%L, ...); or end it: select bridge.unwatch(%L).',
                          tg_relid::regclass, tg_relid::regclass);
  end if;
  if watched is not null then
    hidden := array(select unnest(present) except select unnest(watched));
  end if;

  -- The transaction id before the sequence's values: see next_outbox_id(). A statement without rows takes none.
  if tg_op = 'INSERT' then
    if not exists (select from new_rows) then
      return null;
    end if;
  elsif not exists (select from old_rows) then
    return null;
  end if;
  own_xid := pg_current_xact_id();

  -- OFFSET 0 keeps the planner from repeating to_jsonb() and the key wherever their results are used.
  if tg_op = 'INSERT' then
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when octet_length(e.key) > bridge.key_limit() then bridge.refuse_watched_key(e.key, tg_relid)
                  else e.key end,
             head || (e.entire - hidden)::text || ', "old": null}', 'application/json', surroundings
      from (
        select c.entire,
               case when cardinality(keys) = 1 then c.entire ->> keys[1]
                    else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n))
               end as key
        from (select to_jsonb(r) as entire from new_rows as r offset 0) as c offset 0
      ) as e;
  elsif tg_op = 'DELETE' then
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when octet_length(e.key) > bridge.key_limit() then bridge.refuse_watched_key(e.key, tg_relid)
                  else e.key end,
             head || 'null, "old": ' || (e.entire - hidden)::text || '}', 'application/json', surroundings
      from (
        select c.entire,
               case when cardinality(keys) = 1 then c.entire ->> keys[1]
                    else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n))
               end as key
        from (select to_jsonb(r) as entire from old_rows as r offset 0) as c offset 0
      ) as e;
  else
    -- PostgreSQL adds the old and the new row of an update together, so equal positions are pairs, whatever
    -- became of the primary key. One thing breaks it: a row that moves to a partition which refuses it.
    if (select count(*) from old_rows) <> (select count(*) from new_rows) then
      raise exception 'an update of % moved rows to a partition whose trigger discarded them', tg_relid::regclass
        using errcode = 'triggered_data_change_violation',
              hint = 'Delete those rows instead, or unwatch the table: old and new rows cannot be paired.';
    end if;
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when octet_length(e.key) > bridge.key_limit() then bridge.refuse_watched_key(e.key, tg_relid)
                  else e.key end,
             head || e.new::text || ', "old": ' || e.old::text || '}', 'application/json', surroundings
      from (
        select c.new, c.old,
               case when cardinality(keys) = 1 then c.entire ->> keys[1]
                    else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n))
               end as key
        from (
          select a.entire, a.entire - hidden as new, b.entire - hidden as old
          from (select to_jsonb(r) as entire, row_number() over () as position from new_rows as r) as a
          join (select to_jsonb(r) as entire, row_number() over () as position from old_rows as r) as b
            on b.position = a.position
          order by a.position offset 0
        ) as c
        where c.new <> c.old offset 0
      ) as e;
  end if;
  get diagnostics stored = row_count;
  if stored > 0 and bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return null;
end
$$;

-- Notifications with the ids that the bridge gave them when it heard them: a call that is repeated because its answer
-- was lost makes the same events again, which whoever has seen them recognises.
create function bridge.intake(ids uuid[], channels text[], payloads text[]) returns bigint
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  own_xid xid8;
  stored bigint;
begin
  if cardinality(channels) is distinct from cardinality(payloads)
     or cardinality(channels) is distinct from cardinality(ids) then
    raise exception 'intake() got % ids, % channels and % payloads',
        cardinality(ids), cardinality(channels), cardinality(payloads)
      using errcode = 'invalid_parameter_value', hint = 'Give one id and one payload for each channel.';
  end if;
  own_xid := pg_current_xact_id();
  insert into bridge.outbox (id, event_id, topic, key, payload, content_type)
    select nextval('bridge.outbox_id_seq'), heard.event_id, heard.channel, heard.channel, heard.payload, 'text/plain'
    from (
      select n.event_id, n.channel, n.payload
      from unnest(ids, channels, payloads) with ordinality as n(event_id, channel, payload, position)
      order by n.position
    ) as heard;
  get diagnostics stored = row_count;
  if bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return stored;
end
$$;
comment on function bridge.intake(uuid[], text[], text[]) is
  'Stores notifications that the bridge has heard: one event each, in order; returns how many. Topic and key: channel.';
comment on function bridge.intake(text[], text[]) is
  'As intake(uuid[], text[], text[]), with ids of its own: for a bridge of an older version that still runs.';

-- migrations/0009_passed_over.sql ------------------------------------------------------------

-- What a reader does not take costs it as little as can be: its rows come as one array of ids, not as a row each.
-- And the ids of held events come as an array, which a client writes ten times faster than a multirange.

drop function bridge.read_page(bigint, int8multirange, int, bigint, text[], boolean);
drop function bridge.store_cursor(text, text, bigint, int8multirange, int8multirange);

-- Which topics some patterns take, in the form that takes() tests. Nearly every pattern is plain words with a # at the
-- end or none: LIKE tests those, in a sixth of the time of a regular expression, which is for the others.
create function bridge.topic_test(patterns text[], out likes text[], out regex text)
language sql immutable parallel safe
set search_path = pg_catalog, bridge, pg_temp
as $$
    select coalesce(array_agg(l.likes) filter (where p.is_plain), '{}'),
           bridge.topic_regex(array_agg(distinct p.pattern) filter (where not p.is_plain))
    from (
             select q.pattern, q.pattern !~ '(^|\.)(\*|#\.)' as is_plain,
                    regexp_replace(q.pattern, '([\\%_])', '\\\1', 'g') as escaped
             from unnest(patterns) as q (pattern)
         ) as p,
         lateral (
             select p.escaped as likes where p.escaped !~ '(^|\.)#$'
             union all select '%' where p.escaped = '#'
             union all select unnest(array[left(p.escaped, -2), left(p.escaped, -1) || '%']) where p.escaped ~ '\.#$'
         ) as l
$$;

create function bridge.takes(topic text, likes text[], regex text) returns boolean
language sql immutable parallel safe
return topic like any (likes) or coalesce(('.' || topic) ~ regex, false);

-- The ids of the next rows above the mark, by whether a reader takes them; null where there are none.
-- Planner: as for read_page().
create function bridge.split_page(
    mark bigint, room int, likes text[], regex text, inverted boolean, out taken bigint[], out passed bigint[])
language plpgsql stable
set search_path = pg_catalog, bridge, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
begin
    select array_agg(r.id) filter (where r.is_taken), array_agg(r.id) filter (where not r.is_taken)
    into taken, passed
    from (
        select n.id, bridge.takes(n.topic, split_page.likes, split_page.regex) <> inverted as is_taken
        from bridge.outbox n where n.id > split_page.mark order by n.id limit room
    ) r;
end $$;

-- One page: late rows first (those in the gaps), then the rows above the mark, in id order. The reader takes the topics
-- that `patterns` take (null: all), or with `inverted` all others. The last row is no event: its `passed` are the ids
-- that were seen and not taken, and its id is the xmin of the very snapshot that looked (STABLE: all queries share it),
-- or 0, below every transaction, when there was no room to look into every gap.
-- Planner: estimates on a log that grows by thousands a second are always stale; only the primary key may serve.
create function bridge.read_page(
    mark bigint, gaps int8multirange, page_size int, page_bytes bigint, patterns text[], inverted boolean)
returns table (
    id bigint, event_id text, topic text, key text, payload bytea, content_type text, headers text,
    created_at timestamptz, passed bigint[]
)
language plpgsql stable
set search_path = pg_catalog, bridge, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
declare
    late record;
    room int := page_size;
    bytes_room bigint := page_bytes;
    takes_all constant boolean := patterns is null;
    test constant record := bridge.topic_test(patterns);
    passed_late bigint[] := '{}';
    taken_ids bigint[];
    passed_ids bigint[];
    returned bigint := 0;
begin
    -- unnest() gives the gaps in ascending order and a lateral join keeps it. A sort by id would say so formally,
    -- but would fetch every late row of a bulk transaction for each page.
    for late in
        select o.*
        from unnest(gaps) as gap,
             lateral (select * from bridge.outbox n where n.id >= lower(gap) and n.id < upper(gap)
                      order by n.id limit room) as o
    loop
        id := late.id;
        if takes_all or bridge.takes(late.topic, test.likes, test.regex) <> inverted then
            event_id := late.event_id::text; topic := late.topic; key := late.key;
            payload := convert_to(late.payload, 'UTF8'); content_type := late.content_type;
            headers := bridge.header_texts(late.headers);
            created_at := bridge.calendar_time(late.created_at);
            bytes_room := bytes_room - bridge.event_bytes(late.payload, late.key, late.headers);
            return next;
        else
            passed_late := passed_late || late.id;
        end if;
        room := room - 1;
        if room <= 0 or bytes_room <= 0 then
            -- There may be more in the gaps: none of them can be closed by this look.
            return query select 0::bigint, null::text, null::text, null::text, null::bytea, null::text, null::text,
                                null::timestamptz, passed_late;
            return;
        end if;
    end loop;

    if inverted then
        -- It takes next to nothing, which is seen without making rows.
        select s.* into taken_ids, passed_ids
        from bridge.split_page(mark, room, test.likes, test.regex, inverted) as s;
    end if;
    if not inverted or taken_ids is not null then
        return query
            select o.id, o.event_id::text, o.topic, o.key, convert_to(o.payload, 'UTF8'), o.content_type,
                   bridge.header_texts(o.headers), bridge.calendar_time(o.created_at), null::bigint[]
            from (
                select m.*, sum(m.size) over (order by m.id rows unbounded preceding) - m.size as bytes_before
                from (
                    select r.*, bridge.event_bytes(r.payload, r.key, r.headers) as size
                    from (select * from bridge.outbox n where n.id > read_page.mark order by n.id limit room) r
                    where takes_all or bridge.takes(r.topic, test.likes, test.regex) <> inverted
                ) m
            ) o
            where o.bytes_before < bytes_room order by o.id;
        get diagnostics returned = row_count;
    end if;
    if returned < room and not takes_all then
        if not inverted then
            select s.* into taken_ids, passed_ids
            from bridge.split_page(mark, room, test.likes, test.regex, inverted) as s;
        end if;
        if returned < cardinality(taken_ids) then
            -- It was the bytes that did not suffice: what comes behind the last row is left to the next page.
            passed_ids := array(select p from unnest(passed_ids) as p where p < taken_ids[returned + 1]);
        end if;
    end if;
    return query select pg_snapshot_xmin(pg_current_snapshot())::text::bigint, null::text, null::text, null::text,
                        null::bytea, null::text, null::text, null::timestamptz, passed_late || passed_ids;
end $$;

-- Everything up to this position is settled, but for the ids that are held (null: those stored before). The horizon,
-- this transaction's id, was taken after every page that led to these gaps was read, so it may close them. No row:
-- somebody removed the position.
create function bridge.store_cursor(
    bridge_name text, sink_name text, settled_mark bigint, settled_gaps int8multirange, now_held bigint[])
returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$
    update bridge.cursor
    set mark = settled_mark, gaps = settled_gaps, horizon = pg_current_xact_id(), stored_at = clock_timestamp(),
        held = case when now_held is null then held else (
            select coalesce(range_agg(int8range(i, i + 1)), '{}') from unnest(now_held) as i) end
    where name = bridge_name and sink = sink_name
    returning horizon::text::bigint
$$;

-- migrations/0010_inbox_outcomes.sql ------------------------------------------------------------

-- What the inbox knows of an event that is not finished: not before when it may run again, and with which failure it was
-- given up while its dead letter is still owed to the broker. A handler is never run again because a broker would not
-- take what became of it, and a delay is kept whatever the broker can do.

drop function bridge.inbox_claim(text, uuid[], bigint);
drop function bridge.inbox_release(text, uuid, bigint, integer, integer);

alter table bridge.inbox
    add column due_at   timestamptz,   -- it runs no earlier
    add column failure  jsonb,         -- it was given up with this failure, and its dead letter is owed
    add column ended_at timestamptz;   -- its dead letter was taken; an attempt after that, as of a replay, clears it

-- Claims events, and says of each how it stands. Waits for nobody but who claims the same event for the first time at the
-- same moment; give them in the order of their ids, so that no two callers wait for each other. `state` is
--   claimed   it is ours: run it; `attempt` says which run this is
--   finished  it was handled before: acknowledge it
--   failed    it was given up with `failure` after `attempt` runs: dead-letter it, and say so to inbox_forget()
--   busy      a living process has it: come back later
--   early     it may not run yet: come back after `seconds`
--   alone     its last attempt died with its process, and may have killed it: run it with nothing beside it, by claiming
--             it with `alone`
--   unheld    nobody holds the lock of the token that was given: take a new one first
-- A process never asks for an event that it has in hand, so a claim under its token, or under one of its `former` ones,
-- is one whose answer it did not get: nothing ran, and the attempt is the same. `backoff` are the seconds before the
-- attempts after the first, used where an attempt died; after the last, its last again.
create function bridge.inbox_claim(
    worker_name text, events uuid[], token bigint, former bigint[], backoff double precision[], alone boolean)
returns table (event uuid, state text, attempt integer, seconds double precision, failure jsonb)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    unheld constant boolean := pg_try_advisory_xact_lock_shared(token);
    own constant bigint[] := former || token;
    old bridge.inbox;
    died boolean;
begin
    -- A crash of the server that forgets these claims ends the session that holds their token as well; so nobody
    -- need wait for the disk before the handler runs. What finishes or begins an effect does wait.
    perform set_config('synchronous_commit', 'off', true);
    foreach event in array events loop
        attempt := null;
        seconds := null;
        failure := null;
        if unheld then
            state := 'unheld';
            return next;
            continue;
        end if;
        -- Looks first, since an insert would wait for whoever changes the row that is there.
        if not exists (select from bridge.inbox i where i.worker = worker_name and i.event_id = event) then
            insert into bridge.inbox (worker, event_id, claim) values (worker_name, event, token)
            on conflict do nothing;
            if found then
                state := 'claimed';
                attempt := 1;
                return next;
                continue;
            end if;
        end if;
        -- A row that is locked is being finished, perhaps behind a slow reply: that is nothing to wait for.
        select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
        for no key update skip locked;
        died := old.claim <> all (own) and pg_try_advisory_xact_lock_shared(old.claim);
        if not found then
            state := 'busy';
        elsif old.finished_at is not null then
            state := 'finished';
        elsif old.failure is not null then
            state := 'failed';
            attempt := old.attempts;
            failure := old.failure;
        elsif old.claim <> all (own) and not died then
            state := 'busy';
        elsif died and old.due_at is null then
            state := 'early';
            seconds := backoff[least(old.attempts, cardinality(backoff))];
            update bridge.inbox i set due_at = clock_timestamp() + make_interval(secs => seconds)
            where i.worker = worker_name and i.event_id = event;
        -- Clocks of brokers differ a little from ours.
        elsif old.due_at > clock_timestamp() + interval '0.5 seconds' then
            state := 'early';
            seconds := extract(epoch from old.due_at - clock_timestamp());
        elsif died and not alone then
            state := 'alone';
        else
            state := 'claimed';
            attempt := old.attempts + case when old.claim = any (own) then 0 else 1 end;
            update bridge.inbox i set claim = token, attempts = attempt, due_at = null, ended_at = null
            where i.worker = worker_name and i.event_id = event;
        end if;
        return next;
    end loop;
end $$;

-- Gives a claim up, so that any process may claim the event, after `delay` seconds. `counted` is the number of attempts
-- that stay on record: `attempt` after a failure, one less when the handler was not to blame. False when the claim is no
-- longer ours.
create function bridge.inbox_release(
    worker_name text, event uuid, token bigint, attempt integer, counted integer, delay double precision)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set claim = null, attempts = counted,
        due_at = case when delay > 0 then clock_timestamp() + make_interval(secs => delay) end
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- Gives an event up, with the failure that its dead letter will tell; it never runs again before inbox_forget(). False
-- when the claim is no longer ours.
create function bridge.inbox_fail(worker_name text, event uuid, token bigint, attempt integer, failure jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set claim = null, failure = inbox_fail.failure
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- The dead letter of an event was taken: a replay of it starts afresh. What was begun outside stays on record.
create function bridge.inbox_forget(worker_name text, event uuid) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set failure = null, attempts = 0, ended_at = clock_timestamp()
    where i.worker = worker_name and i.event_id = event and i.failure is not null;
end $$;

-- Two workers that get one event each have effects of their own, and so keys of their own.
create or replace function bridge.inbox_effect_begin(
    worker_name text, event uuid, token bigint, attempt integer, operation text)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = jsonb_build_object(operation, jsonb_build_object(
            'idempotency_key', worker_name || ':' || event::text || ':' || operation,
            'started_at', clock_timestamp())) || i.effects
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning i.effects -> operation into entry;
    return entry;
end $$;

-- Deletes at most `chunk` events of a worker that were finished, or whose dead letters were taken, before `before`, and
-- returns how many those were. What is still to be done stays: it is the evidence of what was begun.
create or replace function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000)
returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and coalesce(o.finished_at, o.ended_at) < before
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- migrations/0011_replays.sql ------------------------------------------------------------

-- A repeat of an event that was given up is told from its replay. Each replay carries a mark of its own in the header
-- `replayed`; the inbox knows those that it has seen, and starts afresh only for a new one. Before, every later delivery
-- was taken for a replay, so that what a bridge had published twice was given up twice.

drop function bridge.inbox_claim(text, uuid[], bigint, bigint[], double precision[], boolean);
drop function bridge.inbox_forget(text, uuid);

alter table bridge.inbox add column replays text[] not null default '{}';  -- the marks of its replays, in their order

-- Claims events, and says of each how it stands. Waits for nobody but who claims the same event for the first time at the
-- same moment; give them in the order of their ids, so that no two callers wait for each other. `state` is
--   claimed   it is ours: run it; `attempt` says which run this is
--   finished  it was handled before, or given up and its dead letter taken: acknowledge it
--   failed    it was given up with `failure` after `attempt` runs: dead-letter it, and say so to inbox_forget()
--   busy      a living process has it: come back later
--   early     it may not run yet: come back after `seconds`
--   alone     its last attempt died with its process, and may have killed it: run it with nothing beside it, by claiming
--             it with `alone`
--   unheld    nobody holds the lock of the token that was given: take a new one first
-- A process never asks for an event that it has in hand, so a claim under its token, or under one of its `former` ones,
-- is one whose answer it did not get: nothing ran, and the attempt is the same. `backoff` are the seconds before the
-- attempts after the first, used where an attempt died; after the last, its last again. `replays` has for each event the
-- mark of the replay that brought it, or null: one that is new starts an event afresh that was given up, any other delivery
-- of such an event is a repeat.
create function bridge.inbox_claim(
    worker_name text, events uuid[], replays text[], token bigint, former bigint[], backoff double precision[],
    alone boolean)
returns table (event uuid, state text, attempt integer, seconds double precision, failure jsonb)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    unheld constant boolean := pg_try_advisory_xact_lock_shared(token);
    own constant bigint[] := former || token;
    old bridge.inbox;
    replay text;
    is_new_replay boolean;
    died boolean;
begin
    -- A crash of the server that forgets these claims ends the session that holds their token as well; so nobody
    -- need wait for the disk before the handler runs. What finishes or begins an effect does wait.
    perform set_config('synchronous_commit', 'off', true);
    for n in 1 .. cardinality(events) loop
        event := events[n];
        replay := replays[n];
        attempt := null;
        seconds := null;
        failure := null;
        if unheld then
            state := 'unheld';
            return next;
            continue;
        end if;
        -- Looks first, since an insert would wait for whoever changes the row that is there.
        if not exists (select from bridge.inbox i where i.worker = worker_name and i.event_id = event) then
            insert into bridge.inbox (worker, event_id, claim, replays)
            values (worker_name, event, token, array_remove(array[replay], null))
            on conflict do nothing;
            if found then
                state := 'claimed';
                attempt := 1;
                return next;
                continue;
            end if;
        end if;
        -- A row that is locked is being finished, perhaps behind a slow reply: that is nothing to wait for.
        select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
        for no key update skip locked;
        died := old.claim <> all (own) and pg_try_advisory_xact_lock_shared(old.claim);
        is_new_replay := replay is not null and replay <> all (old.replays);
        if not found then
            state := 'busy';
        elsif old.finished_at is not null then
            state := 'finished';
        -- Its dead letter was taken, although we may not have heard of that: else nobody could have replayed it.
        elsif is_new_replay and (old.failure is not null or old.ended_at is not null) then
            state := 'claimed';
            attempt := 1;
            update bridge.inbox i set claim = token, attempts = 1, due_at = null, failure = null, ended_at = null,
                replays = old.replays || replay
            where i.worker = worker_name and i.event_id = event;
        elsif old.ended_at is not null then
            state := 'finished';
        elsif old.failure is not null then
            state := 'failed';
            attempt := old.attempts;
            failure := old.failure;
        elsif old.claim <> all (own) and not died then
            state := 'busy';
        elsif died and old.due_at is null then
            state := 'early';
            seconds := backoff[least(old.attempts, cardinality(backoff))];
            update bridge.inbox i set due_at = clock_timestamp() + make_interval(secs => seconds)
            where i.worker = worker_name and i.event_id = event;
        -- Clocks of brokers differ a little from ours.
        elsif old.due_at > clock_timestamp() + interval '0.5 seconds' then
            state := 'early';
            seconds := extract(epoch from old.due_at - clock_timestamp());
        elsif died and not alone then
            state := 'alone';
        else
            state := 'claimed';
            attempt := old.attempts + case when old.claim = any (own) then 0 else 1 end;
            update bridge.inbox i set claim = token, attempts = attempt, due_at = null,
                replays = case when is_new_replay then old.replays || replay else old.replays end
            where i.worker = worker_name and i.event_id = event;
        end if;
        return next;
    end loop;
end $$;

-- The dead letter of an event that was given up was taken: from now on only a replay starts it afresh. What was begun
-- outside stays on record. `replay` is the mark of the delivery whose letter it was: a replay that came since may have
-- given the event up again, and that letter is still owed.
create function bridge.inbox_forget(worker_name text, event uuid, replay text) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set failure = null, ended_at = clock_timestamp()
    where i.worker = worker_name and i.event_id = event and i.failure is not null
      and i.replays[cardinality(i.replays)] is not distinct from replay;
end $$;

-- migrations/0012_together.sql ------------------------------------------------------------

-- What ends at the same time shares a transaction, replies too, and work without an outside effect needs no claim before.

-- Without the worker before it. A plan that was made while the table was new took that index to look for an event, since
-- both cost the same then, and read all events of the worker each time: 1.5 ms an event beside 6,000 others.
drop index bridge.inbox_started;
create index inbox_started on bridge.inbox (started_at);

-- Finishes an event that was run without a claim, since running it twice does no harm. Says how that went:
--   finished  it is finished now
--   repeated  it was finished, or given up and its dead letter taken, before
--   busy      another run of it is on record, and goes on: come back later, with a claim
-- Call it in the transaction of the reply.
create function bridge.inbox_finish_unclaimed(worker_name text, event uuid, outcome jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.inbox;
begin
    insert into bridge.inbox (worker, event_id, finished_at, result)
    values (worker_name, event, clock_timestamp(), outcome)
    on conflict do nothing;
    if found then
        return 'finished';
    end if;
    select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
    for no key update skip locked;
    if old.finished_at is not null or old.ended_at is not null then
        return 'repeated';
    elsif not found or old.failure is not null or not (old.claim is null or pg_try_advisory_xact_lock_shared(old.claim))
    then
        return 'busy';
    end if;
    update bridge.inbox i set finished_at = clock_timestamp(), result = outcome, claim = null, due_at = null
    where i.worker = worker_name and i.event_id = event;
    return 'finished';
end $$;

-- Finishes events of a worker and calls the reply for each, in a savepoint of its own; the arrays go together, in the
-- order of the ids. A token that is null stands for no claim. `reply_schema` and `reply_name` are null where there is no
-- reply. `state` is
--   finished  it is done, and its reply was called
--   lost      the claim was no longer ours
--   repeated, busy   as inbox_finish_unclaimed() says
--   alone     its reply raised, and nothing of it was stored: try it alone, to hear the error
-- Runs with the rights and the settings of its caller, as a reply would that was called by itself.
create function bridge.inbox_end(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[],
    reply_schema text, reply_name text)
returns table (event uuid, state text)
language plpgsql as $$
declare
    call constant text := case when reply_name is not null then pg_catalog.format(
        'select pg_catalog.count(*) from (select %I.%I($1, $2)) as reply', reply_schema, reply_name) end;
begin
    for n in 1 .. pg_catalog.cardinality(events) loop
        event := events[n];
        begin
            state := case
                when tokens[n] is null then bridge.inbox_finish_unclaimed(worker_name, event, outcomes[n])
                when bridge.inbox_finish(worker_name, event, tokens[n], attempts[n], outcomes[n]) then 'finished'
                else 'lost'
            end;
            if call is not null and state = 'finished' then
                execute call using event, outcomes[n];
            end if;
        exception when others then
            state := 'alone';
        end;
        return next;
    end loop;
end $$;

drop function bridge.inbox_finish_all(text, uuid[], bigint[], integer[], jsonb[]);

-- Gives claims up: for `delays` seconds with `counted` attempts on record, or for good where there is a failure. The
-- arrays go together, in the order of the ids. Returns those whose claims were still ours.
create function bridge.inbox_give_up(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], counted integer[], delays double precision[],
    failures jsonb[])
returns setof uuid
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    was_ours boolean;
begin
    for n in 1 .. cardinality(events) loop
        was_ours := case
            when failures[n] is null
            then bridge.inbox_release(worker_name, events[n], tokens[n], attempts[n], counted[n], delays[n])
            else bridge.inbox_fail(worker_name, events[n], tokens[n], attempts[n], failures[n])
        end;
        if was_ours then
            return next events[n];
        end if;
    end loop;
end $$;

-- migrations/0013_rates.sql ------------------------------------------------------------

-- How often a worker's handlers begin, over all its processes: for somebody else's API that takes so many calls a second.

create table bridge.rates (
    worker  text        primary key,
    last_at timestamptz not null       -- the latest start that was handed out; it may lie ahead
);

comment on table bridge.rates is
    'When the handlers of workers with a rate begin; by the clock of the database, since those of processes differ.';

-- Hands out up to `wanted` starts of a worker, evenly spaced over all that ask, `per_second` a second. Returns a row for
-- each that is wanted: `reserved` starts are the caller's, in `seconds` from now; for the others ask again in `seconds`.
-- Reserved is only what lies within `horizon` seconds: more than that is not lost with a process that dies, however slow
-- the rate and however many ask.
--
-- Time in which nobody asked earns nothing, so there is no burst: a window of a second has never more starts than a second
-- may have, at its beginning as little as later. The last start is kept and not the next one, so that another rate
-- holds from the first call that brings it.
create function bridge.rate_take(
    worker_name text, wanted integer, per_second double precision, horizon double precision)
returns table (seconds double precision, reserved boolean)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    -- Rounded up to what a timestamp can hold: three thirds of a second must not fit into one.
    step constant interval := make_interval(secs => ceil(1e6 / per_second) / 1e6);
    ahead constant interval := make_interval(secs => horizon);
    moment timestamptz;
    latest timestamptz;
    coming timestamptz;
begin
    -- Else each start would wait for the disk. A crash of the server forgets what was handed out shortly before (0.6 s at
    -- the defaults); an unlogged table would forget all, and two would begin in an hour that may have one.
    perform set_config('synchronous_commit', 'off', true);
    select r.last_at into latest from bridge.rates r where r.worker = worker_name for no key update;
    if not found then
        insert into bridge.rates (worker, last_at) values (worker_name, '-infinity') on conflict do nothing;
        select r.last_at into latest from bridge.rates r where r.worker = worker_name for no key update;
    end if;
    -- The time at which the row is ours, however long others had it.
    moment := clock_timestamp();
    -- Nobody reserves beyond the horizon. What lies there was reserved by a clock that has gone back since, as after a
    -- failover, and is nothing to wait for.
    latest := least(latest, moment + ahead);
    coming := greatest(moment, latest + step);
    for n in 1 .. wanted loop
        reserved := coming <= moment + ahead;
        seconds := extract(epoch from coming - moment);
        if reserved then
            latest := coming;
            coming := coming + step;
        else
            -- At the moment when the next one can be reserved, so that those who wait get it, and not whoever comes by
            -- first in a process that is quicker; at high rates when several can, so that few queries bring many.
            seconds := greatest(seconds - horizon, 0.02);
        end if;
        return next;
    end loop;
    update bridge.rates r set last_at = latest where r.worker = worker_name and r.last_at <> latest;
end $$;

comment on function bridge.rate_take(text, integer, double precision, double precision) is
    'Reserves starts of a worker with a rate; returns the seconds until each, or until it is worth to ask again.';

-- migrations/0014_holds.sql ------------------------------------------------------------

-- Workers whose dead letters hold their key (`on_dead_letter = "hold"`): what comes behind a dead letter of its key is moved
-- aside to the dead letters too, and no handler runs for it, until the first has been replayed and handled.

-- A row for each event that is aside. A key is held while it has rows; only the event of the first may run, as a replay.
create table bridge.held (
    worker   text        not null,
    event_id uuid        not null,
    key      text        not null,
    line     bigint      not null generated always as (hashtextextended(key, 0)) stored, -- an index takes no long key
    place    bigint      not null generated always as identity,
    since    timestamptz not null default clock_timestamp(),
    primary key (event_id, worker)
);

-- Neither index begins with the worker, or a plan that is made while the table is new could take the wrong one, see
-- inbox_started in 0012_together.sql.
create index held_line on bridge.held (line, worker, place);

comment on table bridge.held is
    'Events that are dead letters of workers with on_dead_letter = "hold", and hold their key: it goes on once all of '
    'them are handled, in the order of their place.';

-- Claims events as inbox_claim() does, but none whose key is held by another one: that is given up with the code `held`, and
-- is aside from now on. It has had no attempt. `keys` has for each event its key, or null where it has none.
-- It never says that such an event is to wait: the replay for which it would wait may be behind it.
create function bridge.inbox_claim_holding(
    worker_name text, events uuid[], replays text[], keys text[], token bigint, former bigint[],
    backoff double precision[], alone boolean)
returns table (event uuid, state text, attempt integer, seconds double precision, failure jsonb)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    durability constant text := current_setting('synchronous_commit');
    own constant bigint[] := former || token;
    old bridge.inbox;
    replay text;
    first_of_key uuid;
    held jsonb;
    is_new_replay boolean;
    is_aside boolean;
    any_aside boolean := false;
begin
    if pg_try_advisory_xact_lock_shared(token) then
        -- It says of all of them that the token is not held.
        return query select c.* from bridge.inbox_claim(worker_name, events, replays, token, former, backoff, alone) c;
        return;
    end if;
    for n in 1 .. cardinality(events) loop
        event := events[n];
        replay := replays[n];
        select h.event_id into first_of_key from bridge.held h
        where h.line = hashtextextended(keys[n], 0) and h.worker = worker_name and h.key = keys[n]
        order by h.place limit 1;
        if first_of_key <> event then
            -- Whoever releases the key waits until this is stored, or is seen by the second look.
            perform pg_advisory_xact_lock_shared(hashtext(worker_name), hashtext(keys[n]));
            select h.event_id into first_of_key from bridge.held h
            where h.line = hashtextextended(keys[n], 0) and h.worker = worker_name and h.key = keys[n]
            order by h.place limit 1;
        end if;
        if first_of_key is null or first_of_key = event then
            return query select c.* from bridge.inbox_claim(
                worker_name, events[n:n], replays[n:n], token, former, backoff, alone) c;
            continue;
        end if;
        state := 'failed';
        attempt := 0;
        seconds := null;
        failure := null;
        held := jsonb_build_object(
            'code', 'held', 'reason', format('its key waits for the event %s: replay that one first', first_of_key),
            'trace', '');
        is_aside := false;
        if not exists (select from bridge.inbox i where i.worker = worker_name and i.event_id = event) then
            insert into bridge.inbox (worker, event_id, attempts, failure, replays)
            values (worker_name, event, attempt, held, array_remove(array[replay], null))
            on conflict do nothing;
            is_aside := found;
        end if;
        if not is_aside then
            select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
            for no key update skip locked;
            is_new_replay := replay is not null and replay <> all (old.replays);
            if not found then
                state := 'busy';
            elsif old.finished_at is not null or (old.ended_at is not null and not is_new_replay) then
                state := 'finished';
            elsif old.failure is not null and not is_new_replay then
                attempt := old.attempts;
                failure := old.failure;
            elsif old.claim <> all (own) and not pg_try_advisory_xact_lock_shared(old.claim) then
                state := 'busy';
            else
                is_aside := true;
                -- What has a claim of this process never ran: the answer to that was lost.
                attempt := case
                    when is_new_replay then 0
                    when old.claim = any (own) then old.attempts - 1
                    else old.attempts
                end;
                update bridge.inbox i set claim = null, attempts = attempt, due_at = null, ended_at = null,
                    failure = held,
                    replays = case when is_new_replay then old.replays || replay else old.replays end
                where i.worker = worker_name and i.event_id = event;
            end if;
        end if;
        if is_aside then
            any_aside := true;
            failure := held;
            insert into bridge.held (worker, event_id, key) values (worker_name, event, keys[n]) on conflict do nothing;
        end if;
        return next;
    end loop;
    if any_aside then
        -- Claims need not wait for the disk; this must be there before the broker has the letter.
        perform set_config('synchronous_commit', durability, true);
    end if;
end $$;

-- Gives claims up as inbox_give_up() does; those that end for good hold their keys from now on. One that held its key
-- before keeps its place.
create function bridge.inbox_give_up_holding(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], counted integer[], delays double precision[],
    failures jsonb[], keys text[])
returns setof uuid
language sql security definer set search_path = pg_catalog, bridge, pg_temp as $$
    with given_up as materialized (
        select g.event from bridge.inbox_give_up(worker_name, events, tokens, attempts, counted, delays, failures)
            as g (event)
    ), held as (
        insert into bridge.held (worker, event_id, key)
        select worker_name, event, u.key from unnest(events, failures, keys) as u (event, failure, key)
        join given_up using (event)
        where u.failure is not null and u.key is not null
        on conflict do nothing
    )
    select event from given_up
$$;

-- Finishes a claimed event; false when the claim is no longer ours. Call it in the transaction of the reply. It holds its
-- key no more: whatever held one runs as a replay.
create or replace function bridge.inbox_finish(
    worker_name text, event uuid, token bigint, attempt integer, outcome jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    was_replayed boolean;
begin
    update bridge.inbox i set finished_at = clock_timestamp(), result = outcome, claim = null
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning cardinality(i.replays) > 0 into was_replayed;
    if was_replayed then
        delete from bridge.held h where h.event_id = event and h.worker = worker_name;
    end if;
    return was_replayed is not null;
end $$;

-- Finishes an event that was run without a claim, since running it twice does no harm. Says how that went:
--   finished  it is finished now
--   repeated  it was finished, or given up and its dead letter taken, before
--   busy      another run of it is on record, and goes on: come back later, with a claim
-- Call it in the transaction of the reply. A worker that runs events so holds no keys, but may have held some before.
create or replace function bridge.inbox_finish_unclaimed(worker_name text, event uuid, outcome jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.inbox;
begin
    insert into bridge.inbox (worker, event_id, finished_at, result)
    values (worker_name, event, clock_timestamp(), outcome)
    on conflict do nothing;
    if found then
        return 'finished';
    end if;
    select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
    for no key update skip locked;
    if old.finished_at is not null or old.ended_at is not null then
        return 'repeated';
    elsif not found or old.failure is not null or not (old.claim is null or pg_try_advisory_xact_lock_shared(old.claim))
    then
        return 'busy';
    end if;
    update bridge.inbox i set finished_at = clock_timestamp(), result = outcome, claim = null, due_at = null
    where i.worker = worker_name and i.event_id = event;
    if cardinality(old.replays) > 0 then
        delete from bridge.held h where h.event_id = event and h.worker = worker_name;
    end if;
    return 'finished';
end $$;

-- Deletes at most `chunk` events of a worker that were finished, or whose dead letters were taken, before `before`, and
-- returns how many those were. What is still to be done stays, as does what holds a key: it is the evidence of what was
-- begun.
create or replace function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000)
returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and coalesce(o.finished_at, o.ended_at) < before
          and not exists (select from bridge.held h where h.event_id = o.event_id and h.worker = worker_name)
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- How many keys of a worker are held. One may have a million events behind it: it steps from key to key.
create function bridge.held_keys(worker_name text) returns bigint
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    with recursive lines as (
        (select h.line, h.worker from bridge.held h order by h.line, h.worker limit 1)
        union all
        select following.line, following.worker from lines l cross join lateral (
            select h.line, h.worker from bridge.held h where (h.line, h.worker) > (l.line, l.worker)
            order by h.line, h.worker limit 1) as following
    )
    select count(*) from lines where worker = worker_name
$$;

-- What holds a key no longer does, or only one event of it: the key goes on without them, and what becomes of their dead
-- letters is its own matter. Returns how many events that were; `person` is who gave the command.
create function bridge.release_held(worker_name text, event_key text, event uuid, person text) returns bigint
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    released bigint;
begin
    -- What is being set aside at this moment is released, too, see inbox_claim_holding().
    perform pg_advisory_xact_lock(hashtext(worker_name), hashtext(event_key));
    with gone as (
        delete from bridge.held h
        where h.line = hashtextextended(event_key, 0) and h.worker = worker_name and h.key = event_key
          and (event is null or h.event_id = event)
        returning h.event_id, h.place
    )
    insert into bridge.dead_letter_audit (letter, action, event_id, person)
        select worker_name || ':' || g.event_id, 'released', g.event_id, release_held.person from gone g
        order by g.place;
    get diagnostics released = row_count;
    return released;
end $$;

alter table bridge.dead_letter_audit drop constraint dead_letter_audit_action_check;
alter table bridge.dead_letter_audit add constraint dead_letter_audit_action_check
    check (action in ('replayed', 'discarded', 'released'));

comment on table bridge.dead_letter_audit is
    'Which dead letters were taken away, or hold their key no more (released), by whom and why. Without payloads, and '
    'never pruned.';
comment on function bridge.held_keys(text) is
    'How many keys of a worker with on_dead_letter = "hold" are held.';
comment on function bridge.release_held(text, text, uuid, text) is
    'Lets a key of a worker go on without the events that hold it (null), or without one of them; returns how many.';

-- migrations/0015_ends.sql ------------------------------------------------------------

-- What ends without a reply needs no savepoints: there is nothing that could raise for one event and not for another. They
-- were a third of what PostgreSQL had to do for an event of a busy worker.

-- Finishes events of a worker without a reply, as inbox_end() does, all or none.
create function bridge.inbox_finish_together(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[])
returns table (event uuid, state text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    was_replayed boolean;
begin
    -- One after the other, and not in one statement: a plan for many, made while the inbox is new, could read all of it.
    for n in 1 .. cardinality(events) loop
        event := events[n];
        if tokens[n] is null then
            state := bridge.inbox_finish_unclaimed(worker_name, event, outcomes[n]);
        else
            update bridge.inbox i set finished_at = clock_timestamp(), result = outcomes[n], claim = null
            where i.worker = worker_name and i.event_id = event and i.claim = tokens[n] and i.attempts = inbox_finish_together.attempts[n]
              and i.finished_at is null
            returning cardinality(i.replays) > 0 into was_replayed;
            state := case when found then 'finished' else 'lost' end;
            if was_replayed then
                delete from bridge.held h where h.event_id = event and h.worker = worker_name;
            end if;
        end if;
        return next;
    end loop;
end $$;

-- Finishes events of a worker and calls the reply for each, in a savepoint of its own; the arrays go together, in the
-- order of the ids. A token that is null stands for no claim. `reply_schema` and `reply_name` are null where there is no
-- reply, and then an error is an error of all. `state` is
--   finished  it is done, and its reply was called
--   lost      the claim was no longer ours
--   repeated, busy   as inbox_finish_unclaimed() says
--   alone            its reply raised, and nothing of it was stored: try it alone, to hear the error
-- Runs with the rights and the settings of its caller, as a reply would that was called by itself.
create or replace function bridge.inbox_end(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[],
    reply_schema text, reply_name text)
returns table (event uuid, state text)
language plpgsql as $$
declare
    call text;
begin
    if reply_name is null then
        return query select f.event, f.state
            from bridge.inbox_finish_together(worker_name, events, tokens, attempts, outcomes) f;
        return;
    end if;
    call := pg_catalog.format(
        'select pg_catalog.count(*) from (select %I.%I($1, $2)) as reply', reply_schema, reply_name);
    for n in 1 .. pg_catalog.cardinality(events) loop
        event := events[n];
        begin
            state := case
                when tokens[n] is null then bridge.inbox_finish_unclaimed(worker_name, event, outcomes[n])
                when bridge.inbox_finish(worker_name, event, tokens[n], attempts[n], outcomes[n]) then 'finished'
                else 'lost'
            end;
            if state = 'finished' then
                execute call using event, outcomes[n];
            end if;
        exception when others then
            state := 'alone';
        end;
        return next;
    end loop;
end $$;

-- migrations/0016_effects.sql ------------------------------------------------------------

-- Outside effects good enough for money: how old a key is, by the clock that everybody shares; a fresh key once the other side
-- has refused for good; and the word of somebody who found out what became of an effect.

-- What is on record of an effect, with its age in seconds.
create function bridge.effect_entry(entry jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
    select entry || jsonb_build_object(
        'age', extract(epoch from clock_timestamp() - (entry ->> 'started_at')::timestamptz))
$$;

-- The record of an effect that begins again, now and under a fresh key; `refused` has what was before, oldest first.
create function bridge.effect_again(worker_name text, event uuid, operation text, entry jsonb, given jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
    select jsonb_build_object(
        'idempotency_key', pg_catalog.format('%s:%s:%s:%s', worker_name, event, operation,
            2 + jsonb_array_length(coalesce(entry -> 'refused', '[]'))),
        'started_at', clock_timestamp(),
        'refused', coalesce(entry -> 'refused', '[]') || jsonb_build_array(entry - 'refused'))
        || case when given is null then '{}' else jsonb_build_object('given', given) end
$$;

drop function bridge.inbox_effect_begin(text, uuid, bigint, integer, text);

-- Records that an outside effect is about to happen, before it happens. Returns what is on record of it:
-- {"idempotency_key", "started_at", "age" in seconds, "given" if anything was, "result" once it is known, "refused" once it
-- began again}; null when the claim is no longer ours. A second attempt gets the record of the first, so its key, its start
-- and what was given never change.
create function bridge.inbox_effect_begin(
    worker_name text, event uuid, token bigint, attempt integer, operation text, given jsonb default null)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = i.effects || jsonb_build_object(operation, jsonb_build_object(
            'idempotency_key', worker_name || ':' || event::text || ':' || operation,
            'started_at', clock_timestamp())
            || case when given is null then '{}' else jsonb_build_object('given', given) end
            || coalesce(i.effects -> operation, '{}'))
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning i.effects -> operation into entry;
    return bridge.effect_entry(entry);
end $$;

-- Begins an effect again whose result is a refusal for good, now with what is given. `key` is the one that was refused: asked
-- twice, as when the first answer was lost, it returns what the first call made. Else as inbox_effect_begin().
create function bridge.inbox_effect_again(
    worker_name text, event uuid, token bigint, attempt integer, operation text, key text, given jsonb default null)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = case
        when i.effects -> operation ->> 'idempotency_key' = key and i.effects -> operation ? 'result'
        then jsonb_set(i.effects, array[operation], bridge.effect_again(
            worker_name, event, operation, i.effects -> operation, given))
        else i.effects end
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null and i.effects ? operation
    returning i.effects -> operation into entry;
    return bridge.effect_entry(entry);
end $$;

-- Puts on record what became of an effect that was begun and has no result: `outcome`, a JSON object that its handler finds
-- as the result; or null where it never happened, and then it may begin again under a fresh key. `key` is the effect's.
-- False where no such effect waits for an outcome, or its event is being handled.
create function bridge.settle_effect(worker_name text, event uuid, key text, outcome jsonb) returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.inbox;
    operation text;
    entry jsonb;
begin
    if jsonb_typeof(outcome) <> 'object' then
        raise exception 'the outcome of an effect is a JSON object, or null, and not a JSON %', jsonb_typeof(outcome)
            using errcode = 'invalid_parameter_value';
    end if;
    select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event for no key update;
    if not found or old.finished_at is not null
       or not (old.claim is null or pg_try_advisory_xact_lock_shared(old.claim)) then
        return false;
    end if;
    select e.key, e.value into operation, entry from jsonb_each(old.effects) e
    where e.value ->> 'idempotency_key' = settle_effect.key and not e.value ? 'result';
    if not found then
        return false;
    end if;
    update bridge.inbox i set effects = case
        when outcome is null
        then jsonb_set(i.effects, array[operation], bridge.effect_again(worker_name, event, operation, entry, null))
        else jsonb_set(i.effects, array[operation, 'result'], outcome) end
    where i.worker = worker_name and i.event_id = event;
    return true;
end $$;

comment on function bridge.settle_effect(text, uuid, text, jsonb) is
    'Puts on record what became of an outside effect whose outcome is unknown, before its event is replayed.';

-- migrations/0017_money.sql ------------------------------------------------------------

-- What money needs beside effects: what was begun outside and has no outcome can be listed and is never forgotten, who settled
-- it is on record, and what the other side reports by itself becomes an event once, however often it is told.

-- Effects of a worker that were begun, of events that came since then, and have no result, the oldest first. `key` is the
-- idempotency key, `age` in seconds. `state` is
--   running   a living process has the event
--   waiting   the event's next attempt is to come
--   dead      the event was given up
create function bridge.open_effects(worker_name text, since timestamptz)
returns table (event uuid, operation text, key text, begun_at timestamptz, age double precision, given jsonb, state text)
language sql volatile security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    select i.event_id, e.key, e.value ->> 'idempotency_key', (e.value ->> 'started_at')::timestamptz,
        extract(epoch from clock_timestamp() - (e.value ->> 'started_at')::timestamptz), e.value -> 'given',
        case when i.failure is not null or i.ended_at is not null then 'dead'
             when i.claim is null or pg_try_advisory_xact_lock_shared(i.claim) then 'waiting'
             else 'running' end
    from bridge.inbox i, jsonb_each(i.effects) e
    where i.worker = worker_name and i.started_at >= since and i.finished_at is null
      and e.value ? 'started_at' and not e.value ? 'result'
    order by 4
$$;
comment on function bridge.open_effects(text, timestamptz) is
    'Outside effects of a worker that were begun and have no outcome.';

alter table bridge.dead_letter_audit drop constraint dead_letter_audit_action_check;
alter table bridge.dead_letter_audit add constraint dead_letter_audit_action_check
    check (action in ('replayed', 'discarded', 'released', 'settled'));
comment on table bridge.dead_letter_audit is
    'Which dead letters were taken away, or hold their key no more (released), or for which effect it was said what became of '
    'it (settled: `why` has its key and the outcome), by whom and why. Without payloads, and never pruned.';

drop function bridge.settle_effect(text, uuid, text, jsonb);

-- Puts on record what became of an effect that was begun and has no result: `outcome`, a JSON object that its handler finds
-- as the result; or null where it never happened, and then it may begin again, at any time and under a fresh key. `key` is the effect's,
-- `person` whoever found out. False where no such effect waits for an outcome, or its event is being handled.
create function bridge.settle_effect(
    worker_name text, event uuid, key text, outcome jsonb, person text default session_user)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.inbox;
    operation text;
    entry jsonb;
begin
    if jsonb_typeof(outcome) <> 'object' then
        raise exception 'the outcome of an effect is a JSON object, or null, and not a JSON %', jsonb_typeof(outcome)
            using errcode = 'invalid_parameter_value';
    end if;
    select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event for no key update;
    if not found or old.finished_at is not null
       or not (old.claim is null or pg_try_advisory_xact_lock_shared(old.claim)) then
        return false;
    end if;
    select e.key, e.value into operation, entry from jsonb_each(old.effects) e
    where e.value ->> 'idempotency_key' = settle_effect.key and e.value ? 'started_at' and not e.value ? 'result';
    if not found then
        return false;
    end if;
    update bridge.inbox i set effects = case
        when outcome is null
        -- It has not begun, so it has no age: inbox_effect_begin() says when it does.
        then jsonb_set(i.effects, array[operation],
            bridge.effect_again(worker_name, event, operation, entry, null) - 'started_at')
        else jsonb_set(i.effects, array[operation, 'result'], outcome) end
    where i.worker = worker_name and i.event_id = event;
    insert into bridge.dead_letter_audit (letter, action, event_id, person, why)
    values (worker_name || ':' || event, 'settled', event, settle_effect.person,
            settle_effect.key || ': ' || coalesce(outcome::text, 'it never happened'));
    return true;
end $$;
comment on function bridge.settle_effect(text, uuid, text, jsonb, text) is
    'Puts on record what became of an outside effect whose outcome is unknown, before its event is replayed, and who said so.';

-- Deletes at most `chunk` events of a worker that were finished, or whose dead letters were taken, before `before`, and
-- returns how many those were. What is still to be done stays, and so does what was given up after it had begun something
-- outside: it is the evidence of that, without which a replay would begin it again.
create or replace function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000)
returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and coalesce(o.finished_at, o.ended_at) < before
          and (o.finished_at is not null or o.effects = '{}')
          and not exists (select from bridge.held h where h.event_id = o.event_id and h.worker = worker_name)
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- What other systems have reported to us, so that a report that comes again is none. -----------------------------------

create table bridge.notice (
    source      text        not null,   -- the worker that listens
    id          text        not null,   -- the other system's, of the report
    event_id    uuid,                   -- what it became
    received_at timestamptz not null default clock_timestamp(),
    primary key (source, id)
);
create index notice_received on bridge.notice (received_at);
comment on table bridge.notice is
    'Reports of other systems, as webhooks bring them, that have become events; a report that comes again is known by its id.';

-- Records a report as an event, once: its id, or null where the report was received before.
create function bridge.receive_notice(source text, id text, topic text, payload text, key text) returns uuid
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    emitted uuid;
begin
    insert into bridge.notice (source, id) values (receive_notice.source, receive_notice.id) on conflict do nothing;
    if not found then
        return null;
    end if;
    emitted := bridge.emit(topic, payload::json, key);
    update bridge.notice n set event_id = emitted where n.source = receive_notice.source and n.id = receive_notice.id;
    return emitted;
end $$;
comment on function bridge.receive_notice(text, text, text, text, text) is
    'Records what another system reports as an event, once for each id.';

-- Deletes at most `chunk` reports of a source that were received before then; returns how many.
create function bridge.prune_notices(source text, before timestamptz, chunk integer default 1000) returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.notice n using (
        select o.id from bridge.notice o
        where o.source = prune_notices.source and o.received_at < before
        order by o.received_at limit chunk for update skip locked) as old
    where n.source = prune_notices.source and n.id = old.id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- migrations/0018_webhooks.sql ------------------------------------------------------------

-- Outgoing webhooks: who wants which topics, what is to be sent to each, and what became of it. A worker whose reply is
-- webhook_fan_out() stores each event once and a delivery for each endpoint that wants it; `pgbridge-worker deliver` claims
-- what is due, posts it, and records what came.
--
-- Locks: whoever changes deliveries that are not finished holds the row of their endpoint, several in the order of their
-- ids. Only claims skip rows that are locked, so nobody waits for a ring of others.

create table bridge.webhook_endpoint (
    id            bigint           primary key generated always as identity,
    url           text             not null,
    topics        text[]           not null,
    likes         text[]           not null, -- the topics as takes() tests them
    regex         text,
    description   text             not null default '',
    concurrency   integer          not null default 4,
    rate          double precision,
    created_at    timestamptz      not null default clock_timestamp(),
    disabled_at   timestamptz,
    disabled_why  text,
    failures      integer          not null default 0,
    opened        integer          not null default 0,
    open_until    timestamptz,
    paused_until  timestamptz,
    next_start_at timestamptz,
    failing_since timestamptz,
    apart         integer          not null default 0,
    last_apart_at timestamptz,
    last_success_at timestamptz
) with (fillfactor = 50); -- No column that changes often is in an index: updates stay in the page.

comment on table bridge.webhook_endpoint is 'Where webhooks go; changed only through functions, as add_endpoint().';
comment on column bridge.webhook_endpoint.concurrency is 'Most requests to it at once, over all processes.';
comment on column bridge.webhook_endpoint.rate is 'Most requests a second, over all processes; null: no limit.';
comment on column bridge.webhook_endpoint.failures is 'Attempts that failed in a row, of whichever delivery.';
comment on column bridge.webhook_endpoint.opened is 'How often in a row the circuit breaker has opened.';
comment on column bridge.webhook_endpoint.open_until is
    'Null while the circuit breaker is closed; until then nothing is sent, and after it one delivery at a time.';
comment on column bridge.webhook_endpoint.paused_until is 'Until when the endpoint asked not to be sent anything (Retry-After).';
comment on column bridge.webhook_endpoint.next_start_at is 'With a rate: when the next request may begin.';
comment on column bridge.webhook_endpoint.failing_since is 'The first failure since the last success.';
comment on column bridge.webhook_endpoint.apart is 'Failures since then that lay an hour or more apart; last_apart_at is the last.';

-- Apart from the endpoints, so that whoever may look at those need not see how to sign for them.
create table bridge.webhook_secret (
    endpoint   bigint      not null references bridge.webhook_endpoint on delete cascade,
    secret     text        not null,
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    primary key (endpoint, secret)
);

comment on table bridge.webhook_secret is
    'What signs; one without an end for each endpoint, and those before it until they expire. For nobody to read.';

create table bridge.webhook_message (
    event_id   uuid        primary key,
    topic      text        not null,
    key        text,
    event_time timestamptz not null,
    body       text        not null,
    size       integer     not null generated always as (octet_length(body)) stored,
    created_at timestamptz not null default clock_timestamp()
);

create index webhook_message_created on bridge.webhook_message (created_at);

comment on table bridge.webhook_message is 'The body of each event that some endpoint wants, as it is signed and posted.';

create table bridge.webhook_delivery (
    id          bigint      primary key generated always as identity,
    endpoint    bigint      not null references bridge.webhook_endpoint on delete cascade,
    event_id    uuid        not null references bridge.webhook_message,
    state       text        not null check (state in ('due', 'sending', 'done', 'failed', 'skipped')),
    attempts    integer     not null default 0,
    failures    integer     not null default 0,
    due_at      timestamptz,
    sent_at     timestamptz,
    last_status integer,
    last_error  text,
    created_at  timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    unique (event_id, endpoint), -- the event first: by it messages without deliveries are found
    check ((due_at is null) = (state in ('done', 'failed', 'skipped'))),
    check ((finished_at is null) = (state in ('due', 'sending')))
);

-- Every other index is for some states only, and no two of them for the same: what is due is found whatever the history,
-- and no plan can take the index of the history for it.
create index webhook_delivery_due on bridge.webhook_delivery (endpoint, due_at, id) where state = 'due';
create index webhook_delivery_sending on bridge.webhook_delivery (endpoint, due_at, id) where state = 'sending';
create index webhook_delivery_done on bridge.webhook_delivery (endpoint, finished_at, id) where state = 'done';
create index webhook_delivery_failed on bridge.webhook_delivery (endpoint, finished_at, id) where state = 'failed';
create index webhook_delivery_skipped on bridge.webhook_delivery (endpoint, finished_at, id) where state = 'skipped';

comment on table bridge.webhook_delivery is
    'A message on its way to an endpoint: due, sending, done, failed (no further attempt), or skipped (the endpoint was '
    'disabled). Id and attempts together are the token of a claim.';
comment on column bridge.webhook_delivery.attempts is 'Requests that were begun, also those of processes that died.';
comment on column bridge.webhook_delivery.failures is 'Attempts that failed since it was made due: its place in the schedule.';
comment on column bridge.webhook_delivery.due_at is
    'When it is to be sent; while it is sent: when the claim ends, and it is due again.';

create table bridge.webhook_attempt (
    delivery bigint           not null references bridge.webhook_delivery on delete cascade,
    number   integer          not null,
    at       timestamptz      not null,
    status   integer,
    duration double precision,
    error    text             not null,
    answer   text             not null,
    primary key (delivery, number)
);

comment on table bridge.webhook_attempt is
    'What came of each request; the answer''s beginning as text. Without a duration: its process never said.';

-- Whether this is the name of a host, or an address as URLs have it. A last label that is a number makes an address of the
-- whole, and what some programs read in other forms of those is no business of ours.
create function bridge.is_host(host text) returns boolean
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
begin
    if host ~ '^\[.*\]$' then
        return host ~ '^\[[0-9a-fA-F:.]+\]$' and family(substring(host from 2 for length(host) - 2)::inet) = 6;
    elsif host ~ '(^|\.)(\d+|0[xX][0-9a-fA-F]*)\.?$' then
        return host ~ '^((0|[1-9]\d{0,2})\.){3}(0|[1-9]\d{0,2})$' and host::inet is not null;
    end if;
    return length(host) <= 253 and host ~ '^([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.(?!$)|\.?$))+$';
exception when data_exception then
    return false;
end $$;

-- Raises what is wrong with an address. Whether it may be connected to is looked at when that is done: a name may lead
-- somewhere else by then.
create function bridge.check_webhook_url(url text) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
declare
    shown constant text := left(url, 80);
    authority constant text := substring(url from '^https?://([^/?#]*)');
begin
    if url is null then
        raise exception 'the URL of a webhook is null'
            using errcode = 'null_value_not_allowed', hint = 'Give one such as https://example.com/hooks.';
    elsif octet_length(url) > 2048 then
        raise exception 'the URL of a webhook has % bytes; 2048 are allowed', octet_length(url)
            using errcode = 'invalid_parameter_value', hint = 'What the receiver must know goes into the payload.';
    elsif authority is null then
        raise exception 'the URL of a webhook does not begin with https:// or http://: %', shown
            using errcode = 'invalid_parameter_value', hint = 'It looks like https://example.com/hooks.';
    elsif authority ~ '@' then
        -- It is not repeated: what stands there is a secret.
        raise exception 'the URL of a webhook has a user or a password in it'
            using errcode = 'invalid_parameter_value',
                  hint = 'Leave them out: the receiver knows us by the signature.';
    elsif url ~ '#' then
        raise exception 'the URL of a webhook has a fragment, which is never sent: %', shown
            using errcode = 'invalid_parameter_value', hint = 'Leave out the # and what is behind it, or write %23.';
    elsif url !~ '^[!-~]*$' or url ~ '\\' then
        raise exception 'the URL of a webhook has a backslash in it, or what is not visible ASCII: %', shown
            using errcode = 'invalid_parameter_value',
                  hint = 'Percent-encode them, and write the name of a host as it is in DNS (xn--...).';
    elsif not bridge.is_host(regexp_replace(authority, ':\d{1,5}$', '')) then
        raise exception 'the URL of a webhook has no proper host: %', shown
            using errcode = 'invalid_parameter_value',
                  hint = 'Write a name or an address, [..] around that of IPv6, and a port if it is not the usual one.';
    elsif substring(authority from ':(\d+)$')::int not between 1 and 65535 then
        raise exception 'the URL of a webhook has a port that does not exist: %', shown
            using errcode = 'invalid_parameter_value', hint = 'Ports are 1 to 65535.';
    end if;
end $$;

-- Raises what is wrong with patterns of topics: what the settings refuse in `subscribe`.
create function bridge.check_topic_patterns(patterns text[]) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
declare
    pattern text;
    word text;
begin
    if coalesce(cardinality(patterns), 0) = 0 then
        raise exception 'an endpoint without topics would get nothing'
            using errcode = 'invalid_parameter_value', hint = 'Give patterns such as {shop.order.*}; {#} takes all.';
    end if;
    foreach pattern in array patterns loop
        if pattern is null or pattern = '' then
            raise exception 'a pattern of topics is empty'
                using errcode = 'invalid_parameter_value', hint = 'Give dotted words, such as shop.order.*; # takes all.';
        elsif octet_length(pattern) > 255 then
            raise exception 'a pattern of topics has % bytes; topics and patterns have up to 255', octet_length(pattern)
                using errcode = 'invalid_parameter_value', hint = 'Use * for one word, and # for any number of words.';
        end if;
        foreach word in array string_to_array(pattern, '.') loop
            if word = '>' then
                raise exception 'in the pattern %: > is no wildcard', quote_literal(pattern)
                    using errcode = 'invalid_parameter_value', hint = 'Write # for any number of words.';
            elsif length(word) > 1 and word ~ '[*#]' then
                raise exception 'in the pattern %: * and # stand for whole words between dots, and not for a part of one',
                    quote_literal(pattern)
                    using errcode = 'invalid_parameter_value', hint = 'Write shop.*.placed, or shop.#.';
            end if;
        end loop;
    end loop;
end $$;

create function bridge.check_webhook_limits(concurrency integer, rate double precision) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
begin
    if concurrency not between 1 and 1000 then
        raise exception 'the concurrency of an endpoint is %, and not between 1 and 1000', concurrency
            using errcode = 'invalid_parameter_value', hint = 'It is the most requests to the endpoint at once; 4 is usual.';
    -- NaN is greater than every number.
    elsif not (rate > 0 and (rate <= 1000000 or rate = 'infinity')) then
        raise exception 'the rate of an endpoint is %, and not more than 0 and at most a million a second', rate
            using errcode = 'invalid_parameter_value',
                  hint = 'It is in requests a second: 0.5 is one every two seconds. Leave it out for no limit.';
    end if;
end $$;

-- Raises where a secret is none of Standard Webhooks: whsec_ for HMAC, whsk_ for ed25519. It is never repeated.
create function bridge.check_webhook_secret(secret text) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
declare
    bytes integer;
begin
    if secret !~ '^(whsec|whsk)_([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$' then
        raise exception 'the secret is not of the form whsec_<base64> or whsk_<base64>'
            using errcode = 'invalid_parameter_value', hint = 'Leave it out, and one is made.';
    end if;
    bytes := octet_length(decode(substring(secret from '_(.*)'), 'base64'));
    if secret like 'whsec\_%' and bytes not between 24 and 64 then
        raise exception 'the secret has % bytes; 24 to 64 are allowed behind whsec_', bytes
            using errcode = 'invalid_parameter_value', hint = 'Leave it out, and one of 32 bytes is made.';
    elsif secret like 'whsk\_%' and bytes not in (32, 64) then
        raise exception 'the private key has % bytes; ed25519 has 32 (or 64 with the public one) behind whsk_', bytes
            using errcode = 'invalid_parameter_value', hint = 'pgbridge-worker webhooks add --asymmetric makes a pair.';
    end if;
end $$;

-- Three UUIDs have 366 bits from the server's strong random numbers.
create function bridge.make_webhook_secret() returns text
language sql volatile set search_path = pg_catalog, bridge, pg_temp as $$
    select 'whsec_' || encode(sha256(
        uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64')
$$;

create function bridge.no_such_endpoint(endpoint bigint) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
begin
    raise exception 'there is no endpoint %', coalesce(endpoint::text, 'null')
        using errcode = 'no_data_found', hint = 'See the table bridge.webhook_endpoint, or: pgbridge-worker webhooks list';
end $$;

create function bridge.add_endpoint(
    url text, topics text[], description text default '', concurrency integer default 4, rate double precision default null,
    secret text default null)
returns table (endpoint bigint, signing_secret text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    test record;
begin
    perform bridge.check_webhook_url(url);
    perform bridge.check_topic_patterns(topics);
    perform bridge.check_webhook_limits(concurrency, rate);
    perform bridge.check_webhook_secret(secret);
    test := bridge.topic_test(topics);
    insert into bridge.webhook_endpoint (url, topics, likes, regex, description, concurrency, rate)
    values (add_endpoint.url, add_endpoint.topics, test.likes, test.regex, coalesce(add_endpoint.description, ''),
            coalesce(add_endpoint.concurrency, 4), nullif(add_endpoint.rate, 'infinity'))
    returning id into endpoint;
    signing_secret := coalesce(secret, bridge.make_webhook_secret());
    insert into bridge.webhook_secret (endpoint, secret) values (add_endpoint.endpoint, signing_secret);
    return next;
end $$;

comment on function bridge.add_endpoint(text, text[], text, integer, double precision, text) is
    'Sends webhooks to a URL from now on. Returns the endpoint''s id, and the secret for its receiver, shown only here.';

-- Null leaves a field as it is; the rate 'infinity' is none.
create function bridge.change_endpoint(
    endpoint bigint, url text default null, topics text[] default null, description text default null,
    concurrency integer default null, rate double precision default null)
returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    test record;
    other boolean;
begin
    if url is not null then
        perform bridge.check_webhook_url(url);
    end if;
    if topics is not null then
        perform bridge.check_topic_patterns(topics);
    end if;
    perform bridge.check_webhook_limits(concurrency, rate);
    test := bridge.topic_test(topics);
    select e.url <> change_endpoint.url into other from bridge.webhook_endpoint e where e.id = endpoint
    for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
    update bridge.webhook_endpoint e set
        url = coalesce(change_endpoint.url, e.url),
        topics = coalesce(change_endpoint.topics, e.topics),
        likes = case when change_endpoint.topics is null then e.likes else test.likes end,
        regex = case when change_endpoint.topics is null then e.regex else test.regex end,
        description = coalesce(change_endpoint.description, e.description),
        concurrency = coalesce(change_endpoint.concurrency, e.concurrency),
        rate = nullif(coalesce(change_endpoint.rate, e.rate), 'infinity'),
        next_start_at = case when change_endpoint.rate is null then e.next_start_at end
    where e.id = endpoint;
    if other then
        -- What is known of the old address says nothing of the new one.
        perform bridge.webhook_forget_trouble(endpoint);
    end if;
end $$;

comment on function bridge.change_endpoint(bigint, text, text[], text, integer, double precision) is
    'Changes where an endpoint is, what it gets and how fast. Null leaves a field as it is; the rate infinity is none.';

create function bridge.webhook_forget_trouble(endpoint bigint) returns void
language sql volatile set search_path = pg_catalog, bridge, pg_temp as $$
    update bridge.webhook_endpoint e set failures = 0, opened = 0, open_until = null, paused_until = null,
        failing_since = null, apart = 0, last_apart_at = null
    where e.id = webhook_forget_trouble.endpoint
$$;

create function bridge.rotate_secret(endpoint bigint, grace interval default '24 hours', secret text default null)
returns text
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    made text;
begin
    if grace is null or grace < interval '0' then
        raise exception 'the time for which the old secret signs, too, is negative or null'
            using errcode = 'invalid_parameter_value', hint = 'Give one such as 24 hours; 0 ends it at once.';
    end if;
    perform bridge.check_webhook_secret(secret);
    perform from bridge.webhook_endpoint e where e.id = endpoint for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
    if secret is null and exists (
        select from bridge.webhook_secret s
        where s.endpoint = rotate_secret.endpoint and s.expires_at is null and s.secret like 'whsk\_%') then
        raise exception 'the endpoint % signs with a key pair, and SQL cannot make one', endpoint
            using errcode = 'invalid_parameter_value',
                  hint = 'Give the private key, or: pgbridge-worker webhooks rotate ENDPOINT --asymmetric';
    end if;
    made := coalesce(secret, bridge.make_webhook_secret());
    if exists (select from bridge.webhook_secret s where s.endpoint = rotate_secret.endpoint and s.secret = made) then
        raise exception 'the endpoint % has this secret already', endpoint
            using errcode = 'invalid_parameter_value', hint = 'Give another one, or leave it out, and one is made.';
    end if;
    delete from bridge.webhook_secret s
    where s.endpoint = rotate_secret.endpoint
      and (grace = interval '0' or s.expires_at <= clock_timestamp());
    update bridge.webhook_secret s set expires_at = least(s.expires_at, clock_timestamp() + grace)
    where s.endpoint = rotate_secret.endpoint;
    insert into bridge.webhook_secret (endpoint, secret) values (rotate_secret.endpoint, made);
    return made;
end $$;

comment on function bridge.rotate_secret(bigint, interval, text) is
    'Gives an endpoint a new secret, and returns it. For the grace time the old one signs as well.';

-- At most `most` (null: all) of what is due at an endpoint that is disabled.
create function bridge.webhook_skip(endpoint bigint, most integer) returns bigint
language plpgsql set search_path = pg_catalog, bridge, pg_temp as $$
declare
    skipped bigint;
begin
    update bridge.webhook_delivery d set state = 'skipped', due_at = null, finished_at = clock_timestamp()
    where d.id in (
        (select w.id from bridge.webhook_delivery w where w.state = 'due' and w.endpoint = webhook_skip.endpoint
         order by w.due_at, w.id limit most)
        union all
        (select w.id from bridge.webhook_delivery w where w.state = 'sending' and w.endpoint = webhook_skip.endpoint
             and w.due_at <= clock_timestamp()
         order by w.due_at, w.id limit most));
    get diagnostics skipped = row_count;
    return skipped;
end $$;

create function bridge.webhook_disabled(endpoint bigint, url text, why text, since timestamptz) returns void
language plpgsql set search_path = pg_catalog, bridge, pg_temp as $$
begin
    perform bridge.emit(
        'bridge.webhook.disabled',
        jsonb_build_object('endpoint', endpoint, 'url', url, 'why', why, 'since', since),
        'webhook:' || endpoint);
end $$;

create function bridge.disable_endpoint(endpoint bigint, why text default '') returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.webhook_endpoint;
begin
    select e.* into old from bridge.webhook_endpoint e where e.id = endpoint for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    elsif old.disabled_at is not null then
        return false;
    end if;
    update bridge.webhook_endpoint e
    set disabled_at = clock_timestamp(), disabled_why = coalesce(nullif(why, ''), 'by hand') where e.id = endpoint;
    perform bridge.webhook_disabled(endpoint, old.url, coalesce(nullif(why, ''), 'by hand'), clock_timestamp());
    perform bridge.webhook_skip(endpoint, null);
    return true;
end $$;

comment on function bridge.disable_endpoint(bigint, text) is
    'Sends an endpoint nothing more: what is due is skipped, as is what comes. False where it was disabled already.';

create function bridge.enable_endpoint(endpoint bigint) returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    was_disabled boolean;
begin
    select e.disabled_at is not null into was_disabled from bridge.webhook_endpoint e where e.id = endpoint
    for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
    update bridge.webhook_endpoint e set disabled_at = null, disabled_why = null where e.id = endpoint;
    perform bridge.webhook_forget_trouble(endpoint);
    return was_disabled;
end $$;

comment on function bridge.enable_endpoint(bigint) is
    'Sends an endpoint what comes from now on, and closes its circuit breaker; recover_endpoint() also sends what it missed.';

create function bridge.recover_endpoint(endpoint bigint, since timestamptz) returns bigint
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    recovered bigint;
begin
    if since is null then
        raise exception 'since when the endpoint is to get what it missed is null'
            using errcode = 'null_value_not_allowed', hint = 'Give a time, such as now() - interval ''2 days''.';
    end if;
    perform bridge.enable_endpoint(endpoint);
    update bridge.webhook_delivery d
    set state = 'due', due_at = clock_timestamp(), finished_at = null, failures = 0
    where d.id in (
        select w.id from bridge.webhook_delivery w
        where w.endpoint = recover_endpoint.endpoint and w.state = 'failed' and w.finished_at >= since
        union all
        select w.id from bridge.webhook_delivery w
        where w.endpoint = recover_endpoint.endpoint and w.state = 'skipped' and w.finished_at >= since);
    get diagnostics recovered = row_count;
    return recovered;
end $$;

comment on function bridge.recover_endpoint(bigint, timestamptz) is
    'Enables an endpoint, and makes due again what failed for good or was skipped since then; returns how many those are.';

create function bridge.resend_delivery(delivery bigint) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    its_endpoint bigint;
    disabled_since timestamptz;
    old bridge.webhook_delivery;
begin
    select d.endpoint into its_endpoint from bridge.webhook_delivery d where d.id = delivery;
    if found then
        select e.disabled_at into disabled_since from bridge.webhook_endpoint e where e.id = its_endpoint
        for no key update;
    end if;
    select d.* into old from bridge.webhook_delivery d where d.id = delivery;
    if not found then
        raise exception 'there is no delivery %', coalesce(delivery::text, 'null')
            using errcode = 'no_data_found',
                  hint = 'It may be past the retention. See: pgbridge-worker webhooks show ENDPOINT';
    elsif disabled_since is not null then
        raise exception 'the endpoint % of the delivery % is disabled', its_endpoint, delivery
            using errcode = 'object_not_in_prerequisite_state', hint = 'Enable it first: pgbridge-worker webhooks enable ENDPOINT';
    elsif old.state = 'sending' and old.due_at > clock_timestamp() then
        raise exception 'the delivery % is being sent', delivery
            using errcode = 'object_in_use', hint = 'Wait for what comes of that.';
    end if;
    update bridge.webhook_delivery d set state = 'due', due_at = clock_timestamp(), finished_at = null, failures = 0
    where d.id = delivery;
end $$;

comment on function bridge.resend_delivery(bigint) is
    'Makes a delivery due now, whatever became of it, with its whole schedule of attempts before it.';

create function bridge.remove_endpoint(endpoint bigint) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    delete from bridge.webhook_endpoint e where e.id = endpoint;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
end $$;

comment on function bridge.remove_endpoint(bigint) is
    'Forgets an endpoint, its secrets, its deliveries and their attempts.';

-- Stores an event's message, {"topic", "key", "time", "body"}, and a delivery for each endpoint that wants it: at once due,
-- or skipped where the endpoint is disabled, so that it can be recovered. A second call for an event changes nothing.
create function bridge.webhook_fan_out(event uuid, result jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    its_topic constant text := result ->> 'topic';
    moment constant timestamptz := clock_timestamp();
    wanting bigint[];
    disabled bigint[];
begin
    if its_topic is null or result ->> 'body' is null then
        raise exception 'the result of the event % is not what workers.webhooks:fan_out returns', event
            using errcode = 'invalid_parameter_value',
                  hint = 'bridge.webhook_fan_out takes {"topic", "key", "time", "body"}, all of them texts.';
    end if;
    -- Locked as the foreign key would, so that one that is removed meanwhile is passed over.
    select array_agg(l.id), array_agg(l.id) filter (where l.disabled_at is not null) into wanting, disabled
    from (select e.id, e.disabled_at from bridge.webhook_endpoint e where bridge.takes(its_topic, e.likes, e.regex)
          order by e.id for key share) l;
    if wanting is null then
        return;
    end if;
    insert into bridge.webhook_message (event_id, topic, key, event_time, body)
    values (event, its_topic, result ->> 'key', coalesce((result ->> 'time')::timestamptz, moment), result ->> 'body')
    on conflict do nothing;
    insert into bridge.webhook_delivery (endpoint, event_id, state, due_at, finished_at)
    select w.id, event,
           case when w.id = any (disabled) then 'skipped' else 'due' end,
           case when w.id = any (disabled) then null else moment end,
           case when w.id = any (disabled) then moment end
    from unnest(wanting) as w (id)
    on conflict do nothing;
end $$;

comment on function bridge.webhook_fan_out(uuid, jsonb) is
    'The reply function of workers.webhooks:fan_out: a delivery for each endpoint that wants the topic.';

-- Endpoints that have something to be sent, now or later: when that may begin, and how many requests more they may have.
-- It steps from endpoint to endpoint, so it costs what the endpoints are and not what waits for them.
create function bridge.webhook_waiting(moment timestamptz)
returns table (endpoint bigint, disabled boolean, due_at timestamptz, starts_at timestamptz, in_flight integer, free integer)
language sql stable set search_path = pg_catalog, bridge, pg_temp as $$
    with recursive heads as (
        (select d.endpoint, d.due_at from bridge.webhook_delivery d where d.state = 'due'
         order by d.endpoint, d.due_at, d.id limit 1)
        union all
        select following.endpoint, following.due_at from heads h cross join lateral (
            select d.endpoint, d.due_at from bridge.webhook_delivery d
            where d.state = 'due' and d.endpoint > h.endpoint order by d.endpoint, d.due_at, d.id limit 1) as following
    ), claimed as (
        select d.endpoint, min(d.due_at) as due_at, count(*) filter (where d.due_at > moment) as in_flight
        from bridge.webhook_delivery d where d.state = 'sending' group by d.endpoint
    )
    select e.id, e.disabled_at is not null, least(h.due_at, c.due_at),
           greatest(least(h.due_at, c.due_at), e.open_until, e.paused_until,
                    -- A clock that went back, as after a failover, is nothing to wait for.
                    case when e.next_start_at is not null
                        then least(e.next_start_at, moment + make_interval(secs => 1 / e.rate)) end),
           coalesce(c.in_flight, 0)::integer,
           (case when e.open_until is null then e.concurrency else 1 end - coalesce(c.in_flight, 0))::integer
    from heads h full join claimed c using (endpoint) join bridge.webhook_endpoint e on e.id = endpoint
$$;

-- Claims at most `room` deliveries that are due, of about `bytes_room` bytes, for `lease` seconds: what has no outcome by
-- then is due again, but not for the process that still has it `in_hand`, as after an outage. Each endpoint has at most its concurrency in flight, over all processes, and one probe after its
-- circuit breaker was open. Where more is due than there is room, the next request goes to whoever has the fewest.
create function bridge.webhook_claim(room integer, bytes_room bigint, lease double precision, in_hand bigint[])
returns table (
    delivery bigint, attempt integer, event uuid, endpoint bigint, url text, secrets text[], body text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
    burst constant interval := interval '0.2 seconds'; -- what a rate earns while nobody looks
    moment timestamptz := clock_timestamp();
    bytes_left bigint := bytes_room;
    candidate record;
    e bridge.webhook_endpoint;
    free integer;
    step interval;
    start timestamptz;
    chosen bigint[];
    lost bigint[];
    taken bigint;
begin
    -- Else each claim would wait for the disk. One that a crash forgets is made again, as after any crash.
    perform set_config('synchronous_commit', 'off', true);
    for candidate in
        select slots.endpoint, bool_or(slots.disabled) as disabled, count(*)::integer as quota
        from (
            select w.endpoint, w.disabled, w.due_at, w.in_flight + n as place
            from bridge.webhook_waiting(moment) w
            cross join lateral (
                select count(*) as due from (
                    (select 1 from bridge.webhook_delivery d where d.state = 'due' and d.endpoint = w.endpoint
                         and d.due_at <= moment
                     order by d.due_at, d.id limit greatest(w.free, 1))
                    union all
                    (select 1 from bridge.webhook_delivery d where d.state = 'sending' and d.endpoint = w.endpoint
                         and d.due_at <= moment and d.id <> all (webhook_claim.in_hand)
                     order by d.due_at, d.id limit greatest(w.free, 1))) as each
            ) as found
            cross join lateral generate_series(1, case when w.disabled then 1 else least(w.free, found.due)::integer end) as n
            where w.starts_at <= moment or w.disabled
            order by place, w.due_at limit room
        ) as slots
        group by slots.endpoint
        order by min(slots.place), min(slots.due_at)
    loop
        exit when bytes_left <= 0;
        select w.* into e from bridge.webhook_endpoint w where w.id = candidate.endpoint for no key update skip locked;
        continue when not found;
        if e.disabled_at is not null then
            -- Whoever disabled it could not see what was being stored at that moment, or left some for its number.
            perform bridge.webhook_skip(e.id, 1000);
            continue;
        end if;
        -- The time at which the row is ours, and what is in flight by then.
        moment := clock_timestamp();
        continue when greatest(e.open_until, e.paused_until) > moment;
        select least(candidate.quota, case when e.open_until is null then e.concurrency else 1 end - count(*)) into free
        from bridge.webhook_delivery d where d.state = 'sending' and d.endpoint = e.id and d.due_at > moment;
        if e.rate is not null then
            step := make_interval(secs => ceil(1e6 / e.rate) / 1e6);
            start := moment - burst;
            if e.next_start_at is not null then
                start := greatest(start, least(e.next_start_at, moment + step));
            end if;
            free := least(free, case when start > moment then 0
                else floor(extract(epoch from moment - start) / extract(epoch from step)) + 1 end);
        end if;
        continue when free <= 0;

        select array_agg(c.id order by c.due_at, c.id), array_agg(c.id) filter (where c.state = 'sending'), sum(c.size)
        into chosen, lost, taken
        from (
            select due.id, due.state, due.due_at, m.size, sum(m.size) over (order by due.due_at, due.id) - m.size as bytes_before
            from (
                (select d.id, d.state, d.due_at, d.event_id from bridge.webhook_delivery d
                 where d.state = 'sending' and d.endpoint = e.id and d.due_at <= moment
                     and d.id <> all (webhook_claim.in_hand)
                 order by d.due_at, d.id limit free)
                union all
                (select d.id, d.state, d.due_at, d.event_id from bridge.webhook_delivery d
                 where d.state = 'due' and d.endpoint = e.id and d.due_at <= moment
                 order by d.due_at, d.id limit free)
                order by due_at, id limit free
            ) as due
            join bridge.webhook_message m on m.event_id = due.event_id
        ) as c
        where c.bytes_before < bytes_left;
        continue when chosen is null;
        bytes_left := bytes_left - taken;

        insert into bridge.webhook_attempt (delivery, number, at, error, answer)
        select d.id, d.attempts, d.sent_at, 'the process that sent it did not say what came of it', ''
        from bridge.webhook_delivery d where d.id = any (lost);
        update bridge.webhook_delivery d set state = 'sending', attempts = d.attempts + 1, sent_at = moment,
            due_at = moment + make_interval(secs => lease)
        where d.id = any (chosen);
        if e.rate is not null then
            update bridge.webhook_endpoint w set next_start_at = start + cardinality(chosen) * step where w.id = e.id;
        end if;
        return query
            select d.id, d.attempts, d.event_id, e.id, e.url,
                   (select array_agg(s.secret order by s.created_at desc) from bridge.webhook_secret s
                    where s.endpoint = e.id and (s.expires_at is null or s.expires_at > moment)),
                   m.body
            from unnest(chosen) with ordinality as c (id, place)
            join bridge.webhook_delivery d on d.id = c.id
            join bridge.webhook_message m on m.event_id = d.event_id
            order by c.place;
    end loop;
end $$;

comment on function bridge.webhook_claim(integer, bigint, double precision, bigint[]) is
    'Claims deliveries that are due for one process; (delivery, attempt) is the token with which it records the outcome.';

-- Seconds until something is due that may be sent; null where nothing waits. What waits only for a request to end, which
-- may be another process's, has no time.
create function bridge.webhook_next() returns double precision
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
    moment constant timestamptz := clock_timestamp();
begin
    return (
        select case when min(w.starts_at) is not null then greatest(0, extract(epoch from min(w.starts_at) - moment)) end
        from bridge.webhook_waiting(moment) w where w.free > 0 and not w.disabled);
end $$;

-- Records what came of deliveries that were claimed. `schedule` are the seconds from each failed attempt to the next; after
-- the last one there is none. `retry_afters` are the seconds for which an endpoint asked. Returns for each
--   done      delivered
--   due       it will be sent again
--   failed    it will not
--   skipped   it will not, since its endpoint was disabled
--   repeated  this outcome is on record already
--   late      the claim was lost, and another one is or was made: this outcome counts for nothing
-- and, where this outcome did that to its endpoint, for how many seconds the circuit breaker opened, and why the endpoint
-- was disabled.
create function bridge.webhook_record(
    deliveries bigint[], attempts integer[], statuses integer[], durations double precision[], errors text[],
    answers text[], retry_afters double precision[], schedule double precision[])
returns table (delivery bigint, state text, endpoint bigint, opened double precision, disabled text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    most_failures constant integer := 5; -- in a row, until the circuit breaker opens
    first_opening constant double precision := 10;
    longest_opening constant double precision := 900;
    longest_pause constant double precision := 86400;
    failing_for constant interval := interval '5 days'; -- until an endpoint is disabled that never succeeds,
    least_apart constant integer := 5; -- after so many failures
    apart_by constant interval := interval '1 hour'; -- which lie so far apart
    throttled constant integer[] := array[429, 502, 503, 504];
    moment timestamptz;
    e bridge.webhook_endpoint;
    d bridge.webhook_delivery;
    n integer;
    pause interval;
    succeeded boolean;
begin
    for e in
        select w.* from bridge.webhook_endpoint w
        where w.id in (select g.endpoint from bridge.webhook_delivery g where g.id = any (deliveries))
        order by w.id for no key update
    loop
        moment := clock_timestamp();
        for n in
            select o.place from unnest(deliveries) with ordinality as o (id, place)
            join bridge.webhook_delivery g on g.id = o.id where g.endpoint = e.id order by o.place
        loop
            delivery := deliveries[n];
            endpoint := e.id;
            opened := null;
            disabled := null;
            select g.* into d from bridge.webhook_delivery g where g.id = delivery;
            if d.state is distinct from 'sending' or d.attempts <> attempts[n] then
                state := case when exists (
                    select from bridge.webhook_attempt a
                    where a.delivery = deliveries[n] and a.number = attempts[n] and a.duration is not null)
                    then 'repeated' else 'late' end;
                return next;
                continue;
            end if;
            insert into bridge.webhook_attempt (delivery, number, at, status, duration, error, answer)
            values (d.id, attempts[n], d.sent_at, statuses[n], durations[n], errors[n], answers[n]);
            succeeded := statuses[n] between 200 and 299;
            pause := case when retry_afters[n] is not null
                then make_interval(secs => least(greatest(retry_afters[n], 0), longest_pause)) end;
            if succeeded then
                e.last_success_at := moment;
                e.failures := 0;
                e.opened := 0;
                e.open_until := null;
                e.failing_since := null;
                e.apart := 0;
                e.last_apart_at := null;
            else
                e.failures := e.failures + 1;
                if e.failing_since is null then
                    e.failing_since := moment;
                end if;
                if e.last_apart_at is null or e.last_apart_at <= moment - apart_by then
                    e.apart := e.apart + 1;
                    e.last_apart_at := moment;
                end if;
                -- What was on the way when it opened says nothing new.
                if (case when e.open_until is null then e.failures >= most_failures else e.open_until <= moment end) then
                    opened := least(first_opening * 2.0 ^ least(e.opened, 20), longest_opening);
                    e.opened := e.opened + 1;
                    e.open_until := moment + make_interval(secs => opened);
                end if;
                if pause is not null and statuses[n] = any (throttled) then
                    e.paused_until := greatest(e.paused_until, moment + pause);
                end if;
                if e.disabled_at is null then
                    disabled := case
                        when statuses[n] = 410 then 'it answered 410 Gone'
                        when e.failing_since <= moment - failing_for and e.apart >= least_apart
                            then 'nothing has succeeded since ' || to_char(e.failing_since at time zone 'UTC', 'YYYY-MM-DD HH24:MI "UTC"')
                        end;
                end if;
            end if;

            d.failures := d.failures + 1;
            state := case
                when succeeded then 'done'
                when statuses[n] = 410 or d.failures > cardinality(schedule) then 'failed'
                when disabled is not null or e.disabled_at is not null then 'skipped'
                else 'due'
            end;
            update bridge.webhook_delivery g set
                state = webhook_record.state,
                failures = case when succeeded then g.failures else d.failures end,
                due_at = case when webhook_record.state = 'due' then greatest(
                    moment + make_interval(secs => schedule[d.failures] * (0.9 + 0.2 * random())), moment + pause) end,
                finished_at = case when webhook_record.state <> 'due' then moment end,
                last_status = statuses[n],
                last_error = errors[n]
            where g.id = d.id;
            if disabled is not null then
                e.disabled_at := moment;
                e.disabled_why := disabled;
                perform bridge.webhook_disabled(e.id, e.url, disabled, e.failing_since);
                -- The rest is left to claims, or everybody in this transaction would wait for it.
                perform bridge.webhook_skip(e.id, 1000);
            end if;
            return next;
        end loop;
        update bridge.webhook_endpoint w set
            disabled_at = e.disabled_at, disabled_why = e.disabled_why, failures = e.failures, opened = e.opened,
            open_until = e.open_until, paused_until = e.paused_until, failing_since = e.failing_since, apart = e.apart,
            last_apart_at = e.last_apart_at, last_success_at = e.last_success_at
        where w.id = e.id;
    end loop;
    -- Those of endpoints that were removed.
    return query
        select o.id, 'late', null::bigint, null::double precision, null::text from unnest(deliveries) as o (id)
        where not exists (select from bridge.webhook_delivery g where g.id = o.id);
end $$;

comment on function bridge.webhook_record(
    bigint[], integer[], integer[], double precision[], text[], text[], double precision[], double precision[]) is
    'Records what came of claimed deliveries: delivered, when to try again, the circuit breaker, and the end of endpoints.';

-- How much waits to be sent, and how many circuit breakers are not closed: for metrics.
create function bridge.webhook_backlog(out due bigint, out open_breakers bigint)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    select (select count(*) from bridge.webhook_delivery d where d.state = 'due'),
           (select count(*) from bridge.webhook_endpoint e where e.open_until is not null and e.disabled_at is null)
$$;

-- Deletes at most `chunk` deliveries that were finished before `before`, and as many messages of which nothing is left; says
-- how many those were. What is still to be sent stays.
create function bridge.webhook_prune(before timestamptz, chunk integer, out deliveries bigint, out messages bigint)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    delete from bridge.webhook_delivery d using (
        select o.id from bridge.webhook_endpoint e
        cross join lateral (
            (select n.id from bridge.webhook_delivery n where n.state = 'done' and n.endpoint = e.id
                 and n.finished_at < before
             order by n.finished_at, n.id limit chunk)
            union all
            (select n.id from bridge.webhook_delivery n where n.state = 'failed' and n.endpoint = e.id
                 and n.finished_at < before
             order by n.finished_at, n.id limit chunk)
            union all
            (select n.id from bridge.webhook_delivery n where n.state = 'skipped' and n.endpoint = e.id
                 and n.finished_at < before
             order by n.finished_at, n.id limit chunk)) as o
        limit chunk) as old
    where d.id = old.id and d.state in ('done', 'failed', 'skipped');
    get diagnostics deliveries = row_count;
    delete from bridge.webhook_message m using (
        select o.event_id from bridge.webhook_message o
        where o.created_at < before
          and not exists (select from bridge.webhook_delivery d where d.event_id = o.event_id)
        order by o.created_at limit chunk for update skip locked) as old
    where m.event_id = old.event_id;
    get diagnostics messages = row_count;
end $$;

-- For people. ----------------------------------------------------------------------------------------------

create view bridge.webhook_endpoints as
    select e.id, e.url, e.topics, e.description, e.concurrency, e.rate, e.created_at, e.disabled_at, e.disabled_why,
           case when e.open_until is null then 'closed' when e.open_until > clock_timestamp() then 'open' else 'half open' end
               as breaker,
           e.failures, e.open_until, e.paused_until, e.failing_since, e.last_success_at,
           (select count(*) from bridge.webhook_delivery d where d.state = 'due' and d.endpoint = e.id) as due,
           (select count(*) from bridge.webhook_delivery d where d.state = 'sending' and d.endpoint = e.id) as sending,
           (select count(*) from bridge.webhook_delivery d where d.state = 'failed' and d.endpoint = e.id) as failed,
           (select count(*) from bridge.webhook_delivery d where d.state = 'skipped' and d.endpoint = e.id) as skipped
    from bridge.webhook_endpoint e;

comment on view bridge.webhook_endpoints is 'The endpoints with what waits for each, and how each is.';

-- The latest of each state, so that what is done does not hide what is to be done.
create function bridge.endpoint_deliveries(endpoint bigint, most integer default 20)
returns table (
    id bigint, event_id uuid, topic text, key text, state text, attempts integer, due_at timestamptz,
    last_status integer, last_error text, created_at timestamptz, finished_at timestamptz)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    select d.id, d.event_id, m.topic, m.key, d.state, d.attempts, d.due_at, d.last_status, d.last_error, d.created_at,
           d.finished_at
    from (
        (select n.* from bridge.webhook_delivery n where n.state = 'sending' and n.endpoint = endpoint_deliveries.endpoint
         order by n.due_at, n.id limit most)
        union all
        (select n.* from bridge.webhook_delivery n where n.state = 'due' and n.endpoint = endpoint_deliveries.endpoint
         order by n.due_at, n.id limit most)
        union all
        (select n.* from (
            (select f.* from bridge.webhook_delivery f where f.state = 'done' and f.endpoint = endpoint_deliveries.endpoint
             order by f.finished_at desc, f.id desc limit most)
            union all
            (select f.* from bridge.webhook_delivery f where f.state = 'failed' and f.endpoint = endpoint_deliveries.endpoint
             order by f.finished_at desc, f.id desc limit most)
            union all
            (select f.* from bridge.webhook_delivery f where f.state = 'skipped' and f.endpoint = endpoint_deliveries.endpoint
             order by f.finished_at desc, f.id desc limit most)) as n
         order by n.finished_at desc, n.id desc limit most)
    ) as d
    join bridge.webhook_message m on m.event_id = d.event_id
    order by d.finished_at desc nulls first, d.due_at, d.id desc
$$;

comment on function bridge.endpoint_deliveries(bigint, integer) is
    'What is sent and due next at an endpoint, and what was finished there last: at most so many of each.';

-- migrations/0019_gaps.sql ------------------------------------------------------------

-- Gaps that nobody can fill for long cost nothing: bridge/sources/gaps.py says when they are looked into. They are stored
-- apart, so that a store writes what has changed.

alter table bridge.cursor
  add column old_gaps int8multirange not null default '{}',
  -- Ids close together look alike to the compression, which takes longer than the writing.
  alter column gaps set storage external,
  alter column old_gaps set storage external;
comment on column bridge.cursor.gaps is 'Ids below the mark that have not been seen, and may still appear: the recent ones.';
comment on column bridge.cursor.old_gaps is 'The same, those that wait for a transaction that has been open for long.';

drop function bridge.read_page(bigint, int8multirange, int, bigint, text[], boolean);
drop function bridge.store_cursor(text, text, bigint, int8multirange, bigint[]);
drop function bridge.begin_reading(text, jsonb);

-- One page: late rows first (those in the gaps), then, if these gaps are the `whole` of those that are due, the rows above
-- the mark, in id order. The reader takes the topics that `patterns` take (null: all), or with `inverted` all others.
-- The last row is no event. Its event_id is the snapshot that looked (STABLE: all queries share it), its `passed` are the
-- ids that were seen and not taken, and its id says how far the look went:
--   1   all of these gaps were looked into
--   0   there was no room to look into every gap
--   -1  nowhere: one of the suspects has ended, so the gaps that it may have filled are due as well
-- The payload is a varchar, which costs nothing and tells the client to take it as bytes: text would be decoded there, and
-- convert_to() reads and copies it here.
-- Planner: estimates on a log that grows by thousands a second are always stale; only the primary key may serve.
create function bridge.read_page(
    mark bigint, gaps int8multirange, whole boolean, suspects xid8[], page_size int, page_bytes bigint, patterns text[],
    inverted boolean)
returns table (
    id bigint, event_id text, topic text, key text, payload varchar, content_type text, headers text,
    created_at timestamptz, passed bigint[]
)
language plpgsql stable
set search_path = pg_catalog, bridge, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
declare
    late record;
    room int := page_size;
    bytes_room bigint := page_bytes;
    takes_all constant boolean := patterns is null;
    test constant record := bridge.topic_test(patterns);
    passed_late bigint[] := '{}';
    taken_ids bigint[];
    passed_ids bigint[];
    returned bigint := 0;
    seen constant pg_snapshot := pg_current_snapshot();
    suspect xid8;
begin
    foreach suspect in array suspects loop
        if pg_visible_in_snapshot(suspect, seen) then
            return query select -1::bigint, seen::text, null::text, null::text, null::varchar, null::text, null::text,
                                null::timestamptz, null::bigint[];
            return;
        end if;
    end loop;

    -- unnest() gives the gaps in ascending order and a lateral join keeps it. A sort by id would say so formally,
    -- but would fetch every late row of a bulk transaction for each page.
    for late in
        select o.*
        from unnest(gaps) as gap,
             lateral (select * from bridge.outbox n where n.id >= lower(gap) and n.id < upper(gap)
                      order by n.id limit room) as o
    loop
        id := late.id;
        if takes_all or bridge.takes(late.topic, test.likes, test.regex) <> inverted then
            event_id := late.event_id::text; topic := late.topic; key := late.key;
            payload := late.payload; content_type := late.content_type;
            headers := bridge.header_texts(late.headers);
            created_at := bridge.calendar_time(late.created_at);
            bytes_room := bytes_room - bridge.event_bytes(late.payload, late.key, late.headers);
            return next;
        else
            passed_late := passed_late || late.id;
        end if;
        room := room - 1;
        if room <= 0 or bytes_room <= 0 then
            -- There may be more in the gaps: none of them can be closed by this look.
            return query select 0::bigint, seen::text, null::text, null::text, null::varchar, null::text, null::text,
                                null::timestamptz, passed_late;
            return;
        end if;
    end loop;

    if not whole then
        return query select 1::bigint, seen::text, null::text, null::text, null::varchar, null::text, null::text,
                            null::timestamptz, passed_late;
        return;
    end if;
    if inverted then
        -- It takes next to nothing, which is seen without making rows.
        select s.* into taken_ids, passed_ids
        from bridge.split_page(mark, room, test.likes, test.regex, inverted) as s;
    end if;
    if not inverted or taken_ids is not null then
        return query
            select o.id, o.event_id::text, o.topic, o.key, o.payload::varchar, o.content_type,
                   bridge.header_texts(o.headers), bridge.calendar_time(o.created_at), null::bigint[]
            from (
                select m.*, sum(m.size) over (order by m.id rows unbounded preceding) - m.size as bytes_before
                from (
                    select r.*, bridge.event_bytes(r.payload, r.key, r.headers) as size
                    from (select * from bridge.outbox n where n.id > read_page.mark order by n.id limit room) r
                    where takes_all or bridge.takes(r.topic, test.likes, test.regex) <> inverted
                ) m
            ) o
            where o.bytes_before < bytes_room order by o.id;
        get diagnostics returned = row_count;
    end if;
    if returned < room and not takes_all then
        if not inverted then
            select s.* into taken_ids, passed_ids
            from bridge.split_page(mark, room, test.likes, test.regex, inverted) as s;
        end if;
        if returned < cardinality(taken_ids) then
            -- It was the bytes that did not suffice: what comes behind the last row is left to the next page.
            passed_ids := array(select p from unnest(passed_ids) as p where p < taken_ids[returned + 1]);
        end if;
    end if;
    return query select 1::bigint, seen::text, null::text, null::text, null::varchar, null::text, null::text,
                        null::timestamptz, passed_late || passed_ids;
end $$;

-- Everything up to this position is settled, but for the ids that are held (null: those stored before). Old gaps, null:
-- as stored before. The horizon, this transaction's id, was taken after every page that led to these gaps was read, so it
-- serves all of them. No row: somebody removed the position.
create function bridge.store_cursor(
    bridge_name text, sink_name text, settled_mark bigint, settled_gaps int8multirange, settled_old int8multirange,
    now_held bigint[])
returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$
    update bridge.cursor
    set mark = settled_mark, gaps = settled_gaps, old_gaps = coalesce(settled_old, old_gaps),
        horizon = pg_current_xact_id(), stored_at = clock_timestamp(),
        held = case when now_held is null then held else (
            select coalesce(range_agg(int8range(i, i + 1)), '{}') from unnest(now_held) as i) end
    where name = bridge_name and sink = sink_name
    returning horizon::text::bigint
$$;

-- As 0007 made it, but for the old gaps; the gaps come as text, which a client reads in six tenths of the time.
create function bridge.begin_reading(bridge_name text, readers jsonb)
returns table (sink text, mark bigint, gaps text, horizon bigint, held bigint, began text)
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
#variable_conflict use_column
declare
    cluster constant bigint := (select system_identifier from pg_control_system());
    last_id constant bigint := coalesce(pg_sequence_last_value('bridge.outbox_id_seq'), 0);
    is_known boolean;
    had_sinks constant text[] := (select l.sinks from bridge.leader l where l.name = bridge_name);
    named text[];
    reader record;
    c bridge.cursor;
    lowest bigint;
begin
    named := array(select r ->> 'sink' from jsonb_array_elements(readers) r);
    insert into bridge.cursor (name, sink, mark, gaps, horizon, system_identifier, patterns)
    select c0.name, r ->> 'sink', c0.mark, c0.gaps, c0.horizon, c0.system_identifier,
           array(select jsonb_array_elements_text(r -> 'patterns'))
    from bridge.cursor c0, jsonb_array_elements(readers) r
    where c0.name = bridge_name and c0.sink = '*'
    on conflict do nothing;
    delete from bridge.cursor c0 where c0.name = bridge_name and c0.sink = '*' and cardinality(named) > 0;
    -- Where some route takes everything, or what none takes is dropped, nobody looks for events without a route.
    delete from bridge.cursor c0 where c0.name = bridge_name and c0.sink = '' and not '' = any (named);
    is_known := exists (select from bridge.cursor c0 where c0.name = bridge_name);

    for reader in
        select r ->> 'sink' as sink, array(select jsonb_array_elements_text(r -> 'patterns')) as patterns,
               r ->> 'start' as start
        from jsonb_array_elements(readers) r
    loop
        select * into c from bridge.cursor c0 where c0.name = bridge_name and c0.sink = reader.sink;
        if not found then
            c.mark := 0; c.gaps := '{}'; c.held := '{}'; c.horizon := pg_current_xact_id();
            lowest := (select min(bridge.floor_of(o.mark, o.gaps + o.old_gaps, o.held)) from bridge.cursor o
                       where o.name = bridge_name and (reader.sink = '') = (o.sink = any (named)));
            began := case
                when reader.sink = '' then 'routes'
                -- Somebody removed its position by hand: what it had not published is not known any more.
                when reader.sink = any (had_sinks) then 'removed'
                when reader.start is not null then reader.start
                -- A sink that has another name now goes on where it was.
                when lowest is not null then 'renamed'
                when is_known then 'now'
                else 'beginning'
            end;
            if began in ('routes', 'renamed') then
                c.mark := coalesce(lowest, 0);
            elsif began = 'now' then
                c.mark := coalesce((select max(o.id) from bridge.outbox o), 0);
                -- What was recorded before and commits from now on belongs to it.
                c.gaps := coalesce((
                    select range_agg(int8range(i, i + 1)) from generate_series(greatest(1, c.mark - 10000), c.mark) i
                    where not exists (select from bridge.outbox o where o.id = i)), '{}');
            end if;
        else
            began := 'stored';
            -- Who may fill the old ones is not stored: the first pages find out again.
            c.gaps := c.gaps + c.old_gaps;
            if c.system_identifier <> cluster then
                -- Ids and horizons mean nothing in another cluster (dump and restore, pg_upgrade): the gaps stay, and
                -- wait for a horizon of this one.
                c.horizon := pg_current_xact_id();
            end if;
            if c.mark > last_id then
                -- The log was emptied and its numbers begin again: all that it holds is new.
                began := 'restarted';
                c.mark := 0; c.gaps := '{}'; c.held := '{}';
            elsif (reader.sink = '' and not c.patterns <@ reader.patterns)
               or (reader.sink <> '' and not reader.patterns <@ c.patterns) then
                -- A topic that comes from another sink may not have been published there yet.
                lowest := (select min(bridge.floor_of(o.mark, o.gaps + o.old_gaps, o.held)) from bridge.cursor o
                           where o.name = bridge_name and (reader.sink <> '' or o.sink = any (named)));
                if lowest < c.mark then
                    began := 'routes';
                    c.gaps := c.gaps + int8multirange(int8range(lowest + 1, c.mark + 1));
                    c.horizon := pg_current_xact_id();
                end if;
            end if;
        end if;
        insert into bridge.cursor as o (name, sink, mark, gaps, held, horizon, system_identifier, patterns)
        values (bridge_name, reader.sink, c.mark, c.gaps, c.held, c.horizon, cluster, reader.patterns)
        on conflict (name, sink) do update set
            mark = excluded.mark, gaps = excluded.gaps, old_gaps = '{}', held = excluded.held, horizon = excluded.horizon,
            system_identifier = cluster, patterns = excluded.patterns, problem = null, problem_since = null;
        sink := reader.sink;
        mark := c.mark;
        -- What was held is read again like what was never seen: by its id, before all that follows in its key.
        gaps := (c.gaps + c.held)::text;
        held := (select coalesce(sum(upper(r) - lower(r)), 0) from unnest(c.held) r);
        horizon := c.horizon::text::bigint;
        return next;
    end loop;
    update bridge.leader l
    set sinks = array(select distinct s from unnest(l.sinks || named) s where s <> '' order by s)
    where l.name = bridge_name;
end $$;

-- As 0007 made them, but for the old gaps.
create or replace function bridge.prune(before timestamptz, chunk int, after bigint, out deleted bigint, out next_after bigint)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  old bigint[];
  first_kept bigint;
  last_seen bigint;
  -- Every id that some position has below its mark and not settled; once, since there may be hundreds of thousands.
  open_ids constant int8multirange := coalesce((
    select range_agg(r) from bridge.cursor c, unnest(c.gaps + c.old_gaps + c.held) r), '{}');
begin
  select array_agg(seen.id) filter (where seen.done), min(seen.id) filter (where not seen.done), max(seen.id)
  into old, first_kept, last_seen
  from (
    select o.id,
           o.created_at < before
           and o.id <= coalesce((select min(c.mark) from bridge.cursor c), 0)
           and not o.id <@ open_ids as done
    from (select n.id, n.created_at from bridge.outbox n where n.id > after order by n.id limit chunk) o
  ) seen;
  delete from bridge.outbox o where o.id = any (old);
  get diagnostics deleted = row_count;
  -- A row that commits late into a gap must still be found by a later call.
  next_after := least(coalesce(first_kept - 1, last_seen, after), lower(open_ids) - 1);
end
$$;

create or replace function bridge.status()
  returns table (
    name text, sink text, leader text, leader_since timestamptz, leads boolean, mark bigint, last_id bigint,
    gaps bigint, held bigint, backlog bigint, backlog_exact boolean, oldest_unsent_at timestamptz,
    stored_at timestamptz, asleep boolean, problem text, problem_since timestamptz, dead_letters bigint
  )
  language plpgsql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  bound constant int := 100000;
  c record;
  taken text;
  inverted boolean;
  late bigint;
  late_at timestamptz;
  ahead bigint;
  ahead_at timestamptz;
  seen bigint;
begin
  last_id := coalesce((select max(o.id) from bridge.outbox o), 0);
  for c in
    select cu.*, l.who, l.since from bridge.cursor cu left join bridge.leader l on l.name = cu.name
    order by cu.name, cu.sink
  loop
    name := c.name; sink := c.sink; mark := c.mark; stored_at := c.stored_at;
    gaps := (select coalesce(sum(upper(g) - lower(g)), 0) from unnest(c.gaps + c.old_gaps) g);
    held := (select coalesce(sum(upper(h) - lower(h)), 0) from unnest(c.held) h);
    -- The row says who led last; only the lock says whether that session lives.
    leads := exists (
      select from pg_locks l
      where l.locktype = 'advisory' and l.granted and l.objsubid = 1
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
        and (l.classid::bigint << 32) + l.objid::bigint = bridge.lead_key(c.name));
    leader := case when leads then c.who end;
    leader_since := case when leads then c.since end;
    asleep := coalesce((select b.asleep from bridge.bell b where b.name = c.name), true);
    problem := case when leads then c.problem end;
    problem_since := case when leads then c.problem_since end;

    taken := bridge.topic_regex(c.patterns);
    inverted := c.sink = '';
    select count(*), min(n.created_at) into late, late_at
      from unnest(c.gaps + c.old_gaps + c.held) g,
           lateral (select o.created_at, o.topic from bridge.outbox o where o.id >= lower(g) and o.id < upper(g)
                    order by o.id limit bound) n
      where taken is null or (('.' || n.topic) ~ taken) <> inverted;
    select count(*) filter (where n.is_taken), min(n.created_at) filter (where n.is_taken), count(*)
      into ahead, ahead_at, seen
      from (select o.created_at, taken is null or (('.' || o.topic) ~ taken) <> inverted as is_taken
            from bridge.outbox o where o.id > c.mark order by o.id limit bound) n;
    backlog := late + ahead;
    backlog_exact := seen < bound and late < bound;
    if not backlog_exact then
      backlog := greatest(backlog, last_id - c.mark + late);
    end if;
    oldest_unsent_at := bridge.calendar_time(least(late_at, ahead_at));
    dead_letters := (select count(*) from bridge.dead_letter d where d.bridge = c.name);
    return next;
  end loop;
end
$$;

create or replace function bridge.set_position(bridge_name text, sink_name text, to_mark bigint) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    perform bridge.require_no_leader(bridge_name);
    update bridge.cursor c
    set mark = to_mark, gaps = '{}', old_gaps = '{}', held = '{}', horizon = pg_current_xact_id(), stored_at = clock_timestamp()
    where c.name = bridge_name and c.sink = sink_name;
    return found;
end $$;

-- migrations/0020_watch.sql ------------------------------------------------------------

-- watch() at the price of emit(). capture() asked the catalog in every statement what the trigger's table looks like;
-- watch() knew that, so it writes a function for each table and operation instead. Existing triggers go on with
-- capture(), until watch() is called again for their table: to change them here would lock people's tables, and take
-- rights on them that whoever migrates may not have.

-- What these functions raise, apart from them so that each is short.
create function bridge.refuse_trigger() returns boolean
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  raise exception 'bridge.capture() serves no trigger but those of bridge.watch()'
    using errcode = 'trigger_protocol_violated', hint = 'Drop that trigger, and call bridge.watch() for its table.';
end
$$;

-- A trigger that was made by hand may have no transition tables. Then these names must not find a temporary view of its
-- maker's, which would run as the owner of the function: search_path has this schema before pg_temp. Transition tables
-- come before both.
create view bridge.new_rows as select bridge.refuse_trigger() as refused;
create view bridge.old_rows as select bridge.refuse_trigger() as refused;
comment on view bridge.new_rows is 'Holds nothing: takes the name of a transition table where there is none.';
comment on view bridge.old_rows is 'Holds nothing: takes the name of a transition table where there is none.';

-- Called where somebody has made a cast to json, which few databases have: only then the table's types matter. False when
-- none of them can be such a one.
create function bridge.refuse_foreign_casts(watched regclass) returns boolean
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  if exists (select from pg_attribute as a where a.attrelid = watched and a.attnum > 0 and a.atttypid >= 16384)
     and exists (
       select from pg_cast as c join pg_proc as f on f.oid = c.castfunc join pg_roles as r on r.oid = f.proowner
       where c.casttarget in ('json'::regtype, 'jsonb'::regtype) and c.castsource >= 16384
         and not r.rolsuper and r.rolname <> current_user
     ) then
    raise exception 'a cast to json made by a role other than % stands in the way of bridge.watch()', current_user
      using errcode = 'insufficient_privilege',
            hint = 'It would run with that role''s rights. Drop it, give its function to that role, '
                   'or unwatch the table.';
  end if;
  return false;
end
$$;

-- A row that is not to be recorded: the trigger is none of ours, or a column is gone.
create function bridge.refuse_row(entire jsonb, needed text[], watched regclass) returns boolean
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  if entire ?& needed then
    return bridge.refuse_trigger();
  end if;
  raise exception 'bridge.watch() was told of the column %, which % no longer has',
      (select string_agg(distinct quote_ident(c), ', ') from unnest(needed) as c where not entire ? c), watched
    using errcode = 'undefined_column',
          hint = format('It was renamed or dropped. Watch the table again, with the topic, key and columns that are '
                        'wanted now: select bridge.watch(%L, ...); or end it: select bridge.unwatch(%L).',
                        watched, watched);
end
$$;

create function bridge.refuse_unpaired_rows(watched regclass) returns boolean
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  raise exception 'an update of % moved rows to a partition whose trigger discarded them', watched
    using errcode = 'triggered_data_change_violation',
          hint = 'Delete those rows instead, or unwatch the table: old and new rows cannot be paired.';
end
$$;

-- The expression for a row's part of the payload: all of it, or some columns. A function takes 100 arguments.
create function bridge.watched_part(entire text, columns text[]) returns text
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return case when columns is null then entire else (
    select '(' || string_agg(format('jsonb_build_object(%s)', s.pairs), ' || ' order by s.slice) || ')'
    from (
      select string_agg(format('%L, %s -> %L', c.name, entire, c.name), ', ' order by c.n) as pairs, c.n / 50 as slice
      from (select u.name, row_number() over (order by u.name) - 1 as n from unnest(columns) as u(name) group by u.name) as c
      group by slice
    ) as s
  ) end;

-- Writes the function of a trigger, and returns its name. It runs with the rights of this function's owner, so that
-- writers of the table need none. Whoever calls this by hand gains nothing: the name is always a new one, so no trigger
-- changes its function, and what was given stands in the body as literals only.
--
-- The body knows the table by nothing but its columns' names, so the table may be renamed, moved, dumped and restored.
-- to_jsonb() runs a type's own cast to json, and a cast or a column may be made at any time, so casts are looked for in
-- every statement, and before any row is converted: CASE promises that order.
create function bridge.write_capture(operation text, topic text, keys text[], columns text[]) returns text
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  name constant text := format('capture_%s_%s', operation, right(gen_random_uuid()::text, 12));
  needed constant text := format('array[%s]', (select string_agg(quote_literal(c), ', ') from unnest(keys || columns) as c));
  key constant text := case when cardinality(keys) = 1 then format('c.entire ->> %L', keys[1])
    else (select format('jsonb_build_array(%s)::text', string_agg(format('c.entire -> %L', k), ', ' order by n))
          from unnest(keys) with ordinality as u(k, n)) end;
  row_text constant text := bridge.watched_part('c.entire', columns) || '::text';
  -- Relations of the catalog have their schema: a trigger made by hand may name a transition table pg_cast. Where the
  -- table's columns are in sight, they must not take the place of the function's variables.
  to_json constant text := format($sql$case when (
               select bridge.refuse_foreign_casts(%I.tg_relid) from pg_catalog.pg_cast as k
               where k.castsource >= 16384 and k.casttarget in ('json'::regtype, 'jsonb'::regtype) limit 1
             ) then null else to_jsonb(r.*) end as entire$sql$, name);
  ours constant text := format($sql$tg_level = 'STATEMENT' and tg_op = %L$sql$, upper(operation));
  payload text;
  source text;
begin
  if operation is null or operation not in ('insert', 'update', 'delete') then
    raise exception 'bridge.write_capture() is for bridge.watch()' using errcode = 'invalid_parameter_value';
  end if;
  perform bridge.check_topic(topic);
  -- Updates: PostgreSQL adds the old and the new row together, so equal positions are pairs, whatever became of the
  -- primary key. One thing breaks it: a row that moves to a partition which refuses it. The join is a full one to find
  -- that, and because it can be no nested loop: the plan that is cached for one row serves 100,000 pairs as well.
  -- OFFSET 0 keeps the planner from repeating to_jsonb() wherever its result is used.
  if operation = 'update' then
    payload := $sql$c.new::text || ', "old": ' || c.old::text || '}'$sql$;
    source := format($sql$(
      select a.entire, a.position = b.position as paired, %1$s as new, %2$s as old
      from (
        select %3$s, row_number() over () as position from new_rows as r
      ) as a
      full join (
        select %3$s, row_number() over () as position from old_rows as r
      ) as b on b.position = a.position
      order by a.position offset 0
    ) as c
    where case when c.paired is not true then bridge.refuse_unpaired_rows(tg_relid)
               when %4$s and c.entire ?& %5$s then c.new <> c.old
               else bridge.refuse_row(c.entire, %5$s, tg_relid) end$sql$,
      bridge.watched_part('a.entire', columns), bridge.watched_part('b.entire', columns), to_json, ours, needed);
  else
    payload := case operation when 'insert' then row_text || $sql$ || ', "old": null}'$sql$
                              else $sql$'null, "old": ' || $sql$ || row_text || $sql$ || '}'$sql$ end;
    source := format($sql$(
      select %1$s from %2$s as r offset 0
    ) as c
    where case when %3$s and c.entire ?& %4$s then true else bridge.refuse_row(c.entire, %4$s, tg_relid) end$sql$,
      to_json, case operation when 'insert' then 'new_rows' else 'old_rows' end, ours, needed);
  end if;

  execute format($sql$create function bridge.%1$I() returns trigger
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- A plan made for a statement of many rows is kept for the next ones, and must not be compiled for its cost.
  set jit = off
as %2$L$sql$, name, format($sql$
-- Written by bridge.watch(), which also replaces it; bridge.unwatch() drops it. For one row, a further statement
-- costs a tenth: so nearly everything is in one.
declare
  head text := format('{"operation": "%1$s", "schema": %%s, "table": %%s, "new": ',
                      to_json(tg_table_schema), to_json(tg_table_name));
  surroundings jsonb := case when bridge.has_context() then bridge.context() else '{}' end;
begin
  insert into bridge.outbox (id, topic, key, payload, content_type, headers)
    -- The transaction id before the sequence's value: see next_outbox_id(). A statement without rows takes none.
    select case when pg_current_xact_id() is not null then nextval('bridge.outbox_id_seq') end, %2$L,
           case when octet_length(%3$s) > bridge.key_limit() then bridge.refuse_watched_key(%3$s, tg_relid)
                else %3$s end,
           head || %4$s, 'application/json', surroundings
    from %5$s;
  if found and bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return null;
end
$sql$, operation, topic, key, payload, source));

  -- The roles may not be there yet when the owner watches its own tables.
  execute format('revoke all on function bridge.%I() from public', name);
  if to_regrole('bridge_operator') is not null then
    execute format('grant execute on function bridge.%I() to bridge_operator', name);
  end if;
  return name;
end
$$;
comment on function bridge.write_capture(text, text, text[], text[]) is
  'For bridge.watch(): writes the function for the trigger of one operation, under a new name, which it returns.';

-- Drops the functions that no trigger calls (any more): those that unwatch() has freed, and those of tables that are gone.
-- One session at a time, so that nobody waits for another's transaction; what it leaves, the next call takes.
create function bridge.drop_captures() returns void
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  name text;
begin
  if not pg_try_advisory_xact_lock(hashtext('pgbridge.drop_captures')) then
    return;
  end if;
  for name in
    select p.proname from pg_proc as p
    where p.pronamespace = 'bridge'::regnamespace and p.proname ~ '^capture_(insert|update|delete)_[0-9a-f]{12}$'
      and not exists (select from pg_trigger as t where t.tgfoid = p.oid)
  loop
    execute format('drop function if exists bridge.%I()', name);
  end loop;
end
$$;
comment on function bridge.drop_captures() is 'Drops the functions that bridge.watch() wrote and no trigger calls any more.';

-- As 0008 made it, for triggers that watch() made before, but that the catalog's relations have their schema: a trigger made
-- by hand could name a transition table pg_trigger, and was believed what it said there.
create or replace function bridge.capture() returns trigger
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- The plan that is cached for one row must not join 100,000 pairs by nested loops, nor be compiled for its cost.
  set enable_nestloop = off
  set jit = off
as $$
declare
  keys text[] := tg_argv[1];
  watched text[] := nullif(tg_argv[2], '');
  hidden text[] := '{}';
  present text[];
  own_types boolean;
  head text := format('{"operation": %s, "schema": %s, "table": %s, "new": ',
                      to_json(lower(tg_op)), to_json(tg_table_schema), to_json(tg_table_name));
  surroundings jsonb := case when bridge.has_context() then bridge.context() else '{}' end;
  own_xid xid8;
  stored bigint;
begin
  select array_agg(a.attname::text), bool_or(a.atttypid >= 16384) into present, own_types
  from pg_catalog.pg_trigger as t
  join pg_catalog.pg_attribute as a on a.attrelid = t.tgrelid and a.attnum > 0 and not a.attisdropped
  where t.tgrelid = tg_relid and t.tgname = tg_name and tg_level = 'STATEMENT'
    and (tg_op = 'DELETE' or t.tgnewtable = 'new_rows') and (tg_op = 'INSERT' or t.tgoldtable = 'old_rows');
  if present is null then
    raise exception 'bridge.capture() serves no trigger but those of bridge.watch()'
      using errcode = 'trigger_protocol_violated', hint = format('select bridge.watch(%L)', tg_relid::regclass);
  end if;
  if own_types and exists (
    select from pg_catalog.pg_cast as c
    join pg_catalog.pg_proc as f on f.oid = c.castfunc join pg_catalog.pg_roles as r on r.oid = f.proowner
    where c.casttarget in ('json'::regtype, 'jsonb'::regtype) and c.castsource >= 16384
      and not r.rolsuper and r.rolname <> current_user
  ) then
    raise exception 'a cast to json made by a role other than % stands in the way of bridge.watch()', current_user
      using errcode = 'insufficient_privilege',
            hint = 'It would run with that role''s rights. Drop it, give its function to that role, '
                   'or unwatch the table.';
  end if;
  if not (keys || coalesce(watched, '{}')) <@ present then
    raise exception 'bridge.watch() was told of the column %, which % no longer has',
        (select string_agg(quote_ident(c), ', ') from unnest(keys || watched) as c where c <> all (present)),
        tg_relid::regclass
      using errcode = 'undefined_column',
            hint = format('It was renamed or dropped. Watch the table again, with the topic, key and columns that are '
                          'wanted now: select bridge.watch(%L, ...); or end it: select bridge.unwatch(%L).',
                          tg_relid::regclass, tg_relid::regclass);
  end if;
  if watched is not null then
    hidden := array(select unnest(present) except select unnest(watched));
  end if;

  -- The transaction id before the sequence's values: see next_outbox_id(). A statement without rows takes none.
  if tg_op = 'INSERT' then
    if not exists (select from new_rows) then
      return null;
    end if;
  elsif not exists (select from old_rows) then
    return null;
  end if;
  own_xid := pg_current_xact_id();

  -- OFFSET 0 keeps the planner from repeating to_jsonb() and the key wherever their results are used.
  if tg_op = 'INSERT' then
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when octet_length(e.key) > bridge.key_limit() then bridge.refuse_watched_key(e.key, tg_relid)
                  else e.key end,
             head || (e.entire - hidden)::text || ', "old": null}', 'application/json', surroundings
      from (
        select c.entire,
               case when cardinality(keys) = 1 then c.entire ->> keys[1]
                    else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n))
               end as key
        from (select to_jsonb(r.*) as entire from new_rows as r offset 0) as c offset 0
      ) as e;
  elsif tg_op = 'DELETE' then
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when octet_length(e.key) > bridge.key_limit() then bridge.refuse_watched_key(e.key, tg_relid)
                  else e.key end,
             head || 'null, "old": ' || (e.entire - hidden)::text || '}', 'application/json', surroundings
      from (
        select c.entire,
               case when cardinality(keys) = 1 then c.entire ->> keys[1]
                    else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n))
               end as key
        from (select to_jsonb(r.*) as entire from old_rows as r offset 0) as c offset 0
      ) as e;
  else
    -- PostgreSQL adds the old and the new row of an update together, so equal positions are pairs, whatever
    -- became of the primary key. One thing breaks it: a row that moves to a partition which refuses it.
    if (select count(*) from old_rows) <> (select count(*) from new_rows) then
      raise exception 'an update of % moved rows to a partition whose trigger discarded them', tg_relid::regclass
        using errcode = 'triggered_data_change_violation',
              hint = 'Delete those rows instead, or unwatch the table: old and new rows cannot be paired.';
    end if;
    insert into bridge.outbox (id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), tg_argv[0],
             case when octet_length(e.key) > bridge.key_limit() then bridge.refuse_watched_key(e.key, tg_relid)
                  else e.key end,
             head || e.new::text || ', "old": ' || e.old::text || '}', 'application/json', surroundings
      from (
        select c.new, c.old,
               case when cardinality(keys) = 1 then c.entire ->> keys[1]
                    else (select jsonb_agg(c.entire -> k order by n)::text from unnest(keys) with ordinality as u(k, n))
               end as key
        from (
          select a.entire, a.entire - hidden as new, b.entire - hidden as old
          from (select to_jsonb(r.*) as entire, row_number() over () as position from new_rows as r) as a
          join (select to_jsonb(r.*) as entire, row_number() over () as position from old_rows as r) as b
            on b.position = a.position
          order by a.position offset 0
        ) as c
        where c.new <> c.old offset 0
      ) as e;
  end if;
  get diagnostics stored = row_count;
  if stored > 0 and bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return null;
end
$$;

create or replace function bridge.unwatch("table" regclass) returns void
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  name text;
begin
  for name in
    select t.tgname from pg_trigger as t join pg_proc as p on p.oid = t.tgfoid
    where t.tgrelid = "table" and not t.tgisinternal and p.pronamespace = 'bridge'::regnamespace
      -- capture(): triggers made before this migration.
      and (p.proname = 'capture' or p.proname ~ '^capture_(insert|update|delete)_[0-9a-f]{12}$')
  loop
    execute format('drop trigger %I on %s', name, "table");
  end loop;
  perform bridge.drop_captures();
end
$$;

-- As 0003 made it, but that each trigger has a function of its own.
create or replace function bridge.watch(
  "table" regclass, topic text default null, key text default null, columns text[] default null,
  operations text[] default '{insert,update,delete}'
) returns void
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  relation record;
  present text[];
  keys text[];
  operation text;
begin
  if "table" is null then
    raise exception 'the table to watch is null'
      using errcode = 'null_value_not_allowed', hint = 'Give its name: select bridge.watch(''shop.order'').';
  end if;
  select c.relkind, c.relname, n.nspname, pg_has_role(c.relowner, 'USAGE') as owned into strict relation
  from pg_class as c join pg_namespace as n on n.oid = c.relnamespace where c.oid = "table";
  if relation.relkind not in ('r', 'p') then
    raise exception '% is no table', "table"
      using errcode = 'wrong_object_type', hint = 'Tables and partitioned tables can be watched; views and foreign tables cannot.';
  elsif relation.nspname = 'bridge' then
    raise exception 'the tables of schema bridge cannot be watched'
      using errcode = 'wrong_object_type', hint = 'An event about an event would never end.';
  elsif not relation.owned then
    raise exception 'only the owner of % may watch it', "table" using errcode = 'insufficient_privilege';
  end if;

  if topic is not null then
    perform bridge.check_topic(topic);
  end if;
  if operations is null or cardinality(operations) = 0 or array_position(operations, null) is not null
     or not operations <@ array['insert', 'update', 'delete'] then
    raise exception 'the operations to watch are %', coalesce(operations::text, 'null')
      using errcode = 'invalid_parameter_value', hint = 'Give some of insert, update, delete.';
  end if;

  select array_agg(a.attname::text order by a.attnum) into present
  from pg_attribute as a where a.attrelid = "table" and a.attnum > 0 and not a.attisdropped;
  if key is not null then
    keys := array[key];
  else
    select array_agg(a.attname::text order by k.position) into keys
    from pg_index as i
    cross join lateral unnest(i.indkey::int2[]) with ordinality as k(attnum, position)
    join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indrelid = "table" and i.indisprimary and k.position <= i.indnkeyatts;
    if keys is null then
      raise exception '% has no primary key to order its events by', "table"
        using errcode = 'invalid_table_definition',
              hint = format('Add one, or name a column: select bridge.watch(%L, key => ...)', "table");
    end if;
  end if;
  if columns is not null and (cardinality(columns) = 0 or array_position(columns, null) is not null) then
    raise exception 'the columns to watch are %', columns
      using errcode = 'invalid_parameter_value', hint = 'Name at least one, or leave the argument out to watch all.';
  elsif not keys || coalesce(columns, '{}') <@ present then
    raise exception '% has no column %', "table",
        (select string_agg(quote_ident(c), ', ') from unnest(keys || columns) as c where c <> all (present))
      using errcode = 'undefined_column', hint = format('It has %s. Capitals count.', array_to_string(present, ', '));
  end if;

  perform bridge.unwatch("table");
  foreach operation in array array(select distinct unnest(operations)) loop
    execute format(
      'create trigger %I after %s on %s referencing %s for each statement execute function bridge.%I()',
      'bridge_watch_' || operation, operation, "table",
      case operation when 'insert' then 'new table as new_rows'
                     when 'delete' then 'old table as old_rows'
                     else 'new table as new_rows old table as old_rows' end,
      bridge.write_capture(
        operation,
        coalesce(topic, format('%s.%s.%s', relation.nspname, relation.relname,
                               case operation when 'delete' then 'deleted' when 'update' then 'updated' else 'inserted' end)),
        keys, columns
      )
    );
  end loop;
end
$$;

-- migrations/0021_payload.sql ------------------------------------------------------------

-- Payloads are not compressed by pglz, which an author's transaction waits for: 190 us for 10 kB of JSON, whose storing takes
-- 60. lz4 takes none of that time that can be measured, and a tenth more room; a server that was built
-- without it stores them as they are, in 1.6 times the room. What is in the log already stays as it is.
do $$
begin
  alter table bridge.outbox alter column payload set compression lz4;
exception when feature_not_supported then
  alter table bridge.outbox alter column payload set storage external;
end
$$;

-- migrations/0022_short_ways.sql ------------------------------------------------------------

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

-- migrations/0023_versions_side_by_side.sql ------------------------------------------------------------

-- oldest program: 0021
-- From here on each migration says in its first line which programs may go on, or start, on what it leaves: those that know
-- the schema of that version, or a newer one. Without that line, only those that know the migration itself.
alter table bridge.migration add column oldest_program int;
comment on column bridge.migration.oldest_program is
  'Programs that know this version of the schema or a newer one may run on it. Null: the migration''s own version.';
update bridge.migration set oldest_program = 21 where version = 22;

-- migrations/0024_where_and_pauses.sql ------------------------------------------------------------

-- oldest program: 0023
-- Where one event is, how the workers stand, what is paused; and whose inbox a worker's login may prune.

-- Pauses. ------------------------------------------------------------------------------------------------

create table bridge.pause (
    kind   text        not null check (kind in ('sink', 'worker')),
    bridge text        not null,   -- the bridge of a sink; empty for a worker, whose inbox is no bridge's
    name   text        not null,
    since  timestamptz not null default clock_timestamp(),
    who    text        not null,   -- as the operating system knows them: user@host
    role   text        not null default session_user,
    why    text        not null default '',
    primary key (kind, bridge, name)
);
comment on table bridge.pause is 'Sinks that read no more and workers that take no more, until somebody resumes them.';

-- False where it was paused before; that pause stays as it is.
create function bridge.set_pause(pause_kind text, bridge_name text, pause_name text, person text, reason text)
returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, bridge, pg_temp as $$
begin
    insert into bridge.pause (kind, bridge, name, who, why)
    values (pause_kind, bridge_name, pause_name, person, reason) on conflict do nothing;
    if not found then
        return false;
    end if;
    -- A bridge that leads looks at once; one that does not hear it looks with its next sign of life.
    perform pg_notify('bridge_pause', bridge_name);
    return true;
end $$;
comment on function bridge.set_pause(text, text, text, text, text) is
    'Pauses a sink of a bridge, or a worker (with an empty bridge). False: it was paused.';

create function bridge.end_pause(pause_kind text, bridge_name text, pause_name text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, bridge, pg_temp as $$
begin
    delete from bridge.pause p where p.kind = pause_kind and p.bridge = bridge_name and p.name = pause_name;
    if not found then
        return false;
    end if;
    perform pg_notify('bridge_pause', bridge_name);
    return true;
end $$;
comment on function bridge.end_pause(text, text, text) is 'Lets a paused sink or worker go on. False: it was not paused.';

create function bridge.paused_sinks(bridge_name text) returns table (sink text, since timestamptz, who text, why text)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp as $$
    select p.name, p.since, p.who, p.why from bridge.pause p where p.kind = 'sink' and p.bridge = bridge_name
$$;
comment on function bridge.paused_sinks(text) is 'The sinks of a bridge that are paused.';

create function bridge.worker_pause(worker_name text) returns table (since timestamptz, who text, why text)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp as $$
    select p.since, p.who, p.why from bridge.pause p where p.kind = 'worker' and p.bridge = '' and p.name = worker_name
$$;
comment on function bridge.worker_pause(text) is 'The pause of a worker; no row while it is not paused.';

-- Workers. -----------------------------------------------------------------------------------------------

-- Who has an inbox: from name to name in the primary key, since one name may have millions of rows.
create function bridge.inbox_workers() returns setof text
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp
set enable_seqscan = off set enable_sort = off as $$
    with recursive names as (
        (select i.worker from bridge.inbox i order by i.worker limit 1)
        union all
        select (select i.worker from bridge.inbox i where i.worker > n.worker order by i.worker limit 1)
        from names n where n.worker is not null
    )
    select worker from names where worker is not null
$$;
comment on function bridge.inbox_workers() is 'The workers that have an inbox.';

-- The tokens of claims that live: the advisory locks of one bigint in this database, as somebody holds them.
create function bridge.living_tokens() returns table (token bigint, pid int)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp as $$
    select (l.classid::bigint << 32) + l.objid::bigint, l.pid
    from pg_locks l
    where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and l.mode = 'ExclusiveLock'
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
$$;

-- How the named workers stand, and all that have an inbox. It looks at the hundred thousand events that were begun last,
-- of all workers together: an index over what is not finished would cost every event that finishes. What runs without a
-- claim is in no inbox yet. `dead_letters` are those that the inbox knows of and nobody has discarded since.
create function bridge.worker_status(named text[])
returns table (
    worker text, running bigint, waiting bigint, finished_last_hour bigint, dead_letters bigint, held_keys bigint,
    paused_since timestamptz, paused_by text, paused_why text, is_exact boolean)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp
set enable_seqscan = off set enable_sort = off as $$
    with recent as materialized (
        select i.worker, i.event_id, i.finished_at, i.ended_at, i.failure is not null as failed, i.claim
        from bridge.inbox i order by i.started_at desc limit 100000
    ),
    living as materialized (select t.token from bridge.living_tokens() t),
    counted as (
        select r.worker,
            count(*) filter (where r.open and r.lives) as running,
            count(*) filter (where r.open and not r.lives) as waiting,
            count(*) filter (where r.finished_at > clock_timestamp() - interval '1 hour') as finished,
            count(*) filter (where r.finished_at is null and (r.failed or r.ended_at is not null and not exists (
                select from bridge.dead_letter_audit a
                where a.event_id = r.event_id and a.letter = r.worker || ':' || r.event_id::text
                  and a.action = 'discarded' and a.at > r.ended_at))) as dead
        from (
            select n.*, n.finished_at is null and n.ended_at is null and not n.failed as open,
                n.claim is not null and n.claim in (select l.token from living l) as lives
            from recent n
        ) r
        group by r.worker
    )
    select w.worker, coalesce(c.running, 0), coalesce(c.waiting, 0), coalesce(c.finished, 0), coalesce(c.dead, 0),
        bridge.held_keys(w.worker), p.since, p.who, p.why, (select count(*) < 100000 from recent)
    from (select unnest(named) as worker union select bridge.inbox_workers()) w
    left join counted c on c.worker = w.worker
    left join bridge.pause p on p.kind = 'worker' and p.bridge = '' and p.name = w.worker
    order by w.worker
$$;
comment on function bridge.worker_status(text[]) is
    'How these workers stand, and all that have an inbox; of the hundred thousand events begun last.';

-- Where one event is. ------------------------------------------------------------------------------------

-- Looks for an event among the `chunk` rows of the log below the id `before`, the newest first: the log has no index over
-- event ids, which every emit() would pay for. Gives its id, or null; and where to go on, null at the beginning of the log.
create function bridge.find_event(event uuid, before bigint, chunk int, out id bigint, out next_before bigint)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off as $$
    select max(n.id) filter (where n.event_id = event), min(n.id)
    from (select o.id, o.event_id from bridge.outbox o where o.id < before order by o.id desc limit chunk) n
$$;
comment on function bridge.find_event(uuid, bigint, int) is 'Looks for an event in one part of the log, from its end.';

create function bridge.event_in_log(number bigint)
returns table (
    id bigint, event_id uuid, topic text, key text, content_type text, bytes bigint, recorded_at timestamptz)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp as $$
    select o.id, o.event_id, o.topic, o.key, o.content_type, octet_length(o.payload)::bigint,
        bridge.calendar_time(o.created_at)
    from bridge.outbox o where o.id = number
$$;
comment on function bridge.event_in_log(bigint) is 'One event of the log, without its payload.';

-- How each sink that takes the topic stands to the event with this id in the log. `state` is
--   settled    it was published there, or is a dead letter
--   held       its broker refused it for now, or what is before it in its key
--   in a gap   it was committed late, and the reader has not seen it yet
--   waits      the reader has not come to it, and something is the matter: see `problem`, `paused_since` and `leads`
--   not yet    the reader has not come to it
create function bridge.event_positions(number bigint, event_topic text)
returns table (
    bridge text, sink text, state text, mark bigint, leads boolean, problem text, paused_since timestamptz,
    paused_by text, paused_why text)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp as $$
    select c.name, c.sink,
        case when number <@ c.held then 'held'
             when number <@ (c.gaps + c.old_gaps) then 'in a gap'
             when number <= c.mark then 'settled'
             when p.since is not null or c.problem is not null or not led.now then 'waits'
             else 'not yet' end,
        c.mark, led.now, case when led.now then c.problem end, p.since, p.who, p.why
    from bridge.cursor c
    cross join lateral (select exists (
        select from bridge.living_tokens() t where t.token = bridge.lead_key(c.name)) as now) led
    cross join lateral (select bridge.topic_regex(c.patterns) as regex) taken
    left join bridge.pause p on p.kind = 'sink' and p.bridge = c.name and p.name = c.sink
    where taken.regex is null or (('.' || event_topic) ~ taken.regex) <> (c.sink = '')
    order by c.name, c.sink
$$;
comment on function bridge.event_positions(bigint, text) is 'How each sink stands to one event of the log.';

-- What the inbox of each worker knows of an event. `state` is
--   finished     it was handled, and its reply has run
--   running      a living process has it: `claimed_by`
--   waiting      for another attempt, at `due_at`
--   given up     its dead letter is still to be taken by the broker
--   dead letter  its dead letter was taken by the broker; a replay starts it afresh
create function bridge.event_inbox(event uuid)
returns table (
    worker text, state text, attempts int, started_at timestamptz, finished_at timestamptz, due_at timestamptz,
    ended_at timestamptz, claimed_by text, failure jsonb, result jsonb, effects jsonb, held_key text)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp
set enable_seqscan = off as $$
    select i.worker,
        case when i.finished_at is not null then 'finished'
             when i.ended_at is not null then 'dead letter'
             when i.failure is not null then 'given up'
             when holder.pid is not null then 'running'
             else 'waiting' end,
        i.attempts, i.started_at, i.finished_at, i.due_at, i.ended_at,
        case when i.finished_at is null then holder.who end, i.failure, i.result, i.effects, h.key
    from bridge.inbox_workers() w (name)
    join bridge.inbox i on i.worker = w.name and i.event_id = event
    left join lateral (
        -- Of other roles' sessions only pg_read_all_stats sees more than the pid.
        select t.pid, concat_ws(', ', 'pid ' || t.pid || ' of PostgreSQL', nullif(a.application_name, ''), host(a.client_addr))
            as who
        from bridge.living_tokens() t left join pg_stat_activity a on a.pid = t.pid where t.token = i.claim
    ) holder on true
    left join bridge.held h on h.event_id = i.event_id and h.worker = i.worker
    order by i.worker
$$;
comment on function bridge.event_inbox(uuid) is 'What the inbox of each worker knows of an event.';

-- Also asked for every event that status() counts as a dead letter. The table is small: it has what people did.
create index dead_letter_audit_event on bridge.dead_letter_audit (event_id);

-- Whose inbox a login may prune. ---------------------------------------------------------------------------

create table bridge.worker_login (
    worker text        primary key,
    role   name        not null,
    since  timestamptz not null default clock_timestamp()
);
comment on table bridge.worker_login is
    'Which login''s a worker is: the first that pruned its inbox, or what set_worker_login() said.';

-- Every worker's login is a bridge_worker, and nothing else tells whose a worker is. Superusers may, and are not noted. A
-- role that is gone has left its workers to whoever comes next.
create function bridge.require_own_worker(worker_name text) returns void
language plpgsql volatile set search_path = pg_catalog, bridge, pg_temp as $$
declare
    owner name;
begin
    if (select r.rolsuper from pg_roles r where r.rolname = session_user) then
        return;
    end if;
    delete from bridge.worker_login w
    where w.worker = worker_name and not exists (select from pg_roles r where r.rolname = w.role);
    insert into bridge.worker_login (worker, role) values (worker_name, session_user) on conflict do nothing;
    select w.role into owner from bridge.worker_login w where w.worker = worker_name;
    if not pg_has_role(session_user, owner, 'member') then
        raise exception 'the inbox of the worker % is pruned by the role %, and this is the role %',
            quote_literal(worker_name), quote_literal(owner), quote_literal(session_user)
            using errcode = 'insufficient_privilege', hint = format(
                'If the worker has another login now, or several, an operator runs: select bridge.set_worker_login(%L, '
                'ROLE), with that login, or a role of which all its logins are members.', worker_name);
    end if;
end $$;

create function bridge.set_worker_login(worker_name text, login name) returns void
language plpgsql volatile security definer set search_path = pg_catalog, bridge, pg_temp as $$
begin
    if not exists (select from pg_roles r where r.rolname = login) then
        raise exception 'there is no role %', quote_literal(login) using errcode = 'undefined_object';
    end if;
    insert into bridge.worker_login as w (worker, role) values (worker_name, login)
    on conflict (worker) do update set role = excluded.role, since = clock_timestamp();
end $$;
comment on function bridge.set_worker_login(text, name) is
    'Says which role''s members may prune the inbox of a worker.';

-- As 0017 made it, but only for one's own worker: the inbox is what keeps handled events from being handled again.
create or replace function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000)
returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    perform bridge.require_own_worker(worker_name);
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and coalesce(o.finished_at, o.ended_at) < before
          and (o.finished_at is not null or o.effects = '{}')
          and not exists (select from bridge.held h where h.event_id = o.event_id and h.worker = worker_name)
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- migrations/0025_scheduled.sql ------------------------------------------------------------

-- oldest program: 0024
-- Events that are not to be sent before a time: they wait beside the log, and the bridge that leads moves them into it. A
-- program that knows 0024 only moves none: under it they wait on, until a newer one leads.

create table bridge.scheduled (
  event_id     uuid primary key default gen_random_uuid(),
  id           bigint not null generated always as identity,
  at           timestamptz not null check (isfinite(at)),
  topic        text not null,
  key          text,
  payload      text not null,
  content_type text not null,
  headers      jsonb not null default '{}',
  created_at   timestamptz not null default clock_timestamp()
) with (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
  autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000
);
create index scheduled_due on bridge.scheduled (at, id);
comment on table bridge.scheduled is 'Events of emit(at => ...) that are not due yet: not in the log, and cancelled by cancel().';
comment on column bridge.scheduled.id is 'Events of one time go into the log in this order.';
comment on column bridge.scheduled.created_at is 'When it was scheduled. In the log it has the time of its move.';

-- As in the log, see 0021.
do $$
begin
  alter table bridge.scheduled alter column payload set compression lz4;
exception when feature_not_supported then
  alter table bridge.scheduled alter column payload set storage external;
end
$$;

create function bridge.schedule_event(
    topic text, payload text, content_type text, key text, headers jsonb, at timestamptz) returns uuid
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- Planner: estimates on a table that fills and empties are always stale.
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
declare
  present constant timestamptz := clock_timestamp();
  event uuid;
begin
  if not isfinite(at) or at > present + interval '10 years' then
    raise exception 'an event of topic % cannot wait until %; 10 years are allowed', quote_literal(topic), at
      using errcode = 'invalid_parameter_value',
            hint = 'Give a time within the next 10 years, such as now() + interval ''1 hour''. '
                   'What is past, and null, is recorded at once.';
  elsif at is null or at <= present then
    return bridge.append_event(topic, payload, content_type, key, headers);
  end if;
  if bridge.needs_care(topic, payload, key, headers) then
    headers := bridge.headers_with_care(topic, payload, key, headers);
  end if;
  -- NOTIFY takes a lock of the whole cluster, so whoever leads is woken only for what is due before all that it can know
  -- of. The past is not looked at: while an old snapshot lives, the index has all that was moved. A transaction that is still
  -- open when an earlier event is due may be found late, by the bridge's next poll.
  if not exists (select from bridge.scheduled s where s.at > present and s.at <= schedule_event.at)
     and coalesce(current_setting('bridge.doorbell', true), '') <> 'off' then
    perform pg_notify('bridge_scheduled', '');
  end if;
  insert into bridge.scheduled as s (at, topic, key, payload, content_type, headers)
    values (at, topic, key, payload, content_type, headers) returning s.event_id into event;
  return event;
end
$$;
comment on function bridge.schedule_event(text, text, text, text, jsonb, timestamptz) is
  'What emit(at => ...) comes down to. The event is checked, and takes its context, now.';

-- Functions of their own, since whoever calls those without a time shall pay nothing for this, and since functions of users
-- may depend on those. The time stands third and the headers before the key, so that no call that was valid becomes
-- ambiguous: in emit('t', '{}'::jsonb, 'key', '{}') PostgreSQL takes a bare literal for a text wherever it can.
create function bridge.emit(topic text, payload jsonb, at timestamptz, headers jsonb default '{}', key text default null)
  returns uuid
  language sql volatile
  return bridge.schedule_event(topic, payload::text, 'application/json', key, headers, at);
comment on function bridge.emit(text, jsonb, timestamptz, jsonb, text) is
  'Records an event that is not sent before the time `at`, and returns its id, by which cancel() takes it back.';

create function bridge.emit(topic text, payload json, at timestamptz, headers jsonb default '{}', key text default null)
  returns uuid
  language sql volatile
  return bridge.schedule_event(topic, payload::text, 'application/json', key, headers, at);
comment on function bridge.emit(text, json, timestamptz, jsonb, text) is
  'Records an event that is not sent before the time `at`. The JSON text travels exactly as it is.';

create function bridge.emit(topic text, payload text, at timestamptz, headers jsonb default '{}', key text default null)
  returns uuid
  language sql volatile
  return bridge.schedule_event(topic, payload, 'text/plain', key, headers, at);
comment on function bridge.emit(text, text, timestamptz, jsonb, text) is
  'Records an event with a text/plain payload that is not sent before the time `at`.';

create function bridge.cancel(event_id uuid) returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  delete from bridge.scheduled s where s.event_id = cancel.event_id;
  return found;
end
$$;
comment on function bridge.cancel(uuid) is
  'Takes an event back that waits for its time. False where it does not: it is in the log by now, or never was scheduled.';

-- Moves events that are due into the log, in the order of their times: at most `most`, of `most_bytes` of payload or one,
-- of those due at `until` (null: now) and behind (after_at, after_id).
--
-- A row that somebody is cancelling is not waited for, and left where it is; so is what lies behind it in its key. How many
-- that were is `blocked`, and the next call begins before them and asks for so many more, or stops. `next_in`: seconds until
-- the first event after `until` is due; null without one.
create function bridge.move_due(
    until timestamptz, after_at timestamptz, after_id bigint, most int, most_bytes bigint,
    out moved bigint, out blocked bigint, out moved_until text, out last_at text, out last_id bigint,
    out next_in double precision)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- Planner: estimates on a table that fills and empties are always stale.
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
begin
  moved := 0;
  blocked := 0;
  until := least(until, clock_timestamp());
  moved_until := until::text;
  if exists (select from bridge.scheduled s where s.at <= until and (s.at, s.id) > (after_at, after_id))
     -- Bridges of several names may lead on one log: one would take what another moves for what is being cancelled.
     and pg_try_advisory_xact_lock(hashtextextended('pgbridge scheduled', 0)) then
    -- The leader's session does not wait for the disk. Here a crash must not bring back what was published.
    perform set_config('synchronous_commit', 'local', true);
    -- The transaction id before the sequence's values: see next_outbox_id().
    perform pg_current_xact_id();
    with due as materialized (
      select s.event_id, s.at, s.id, s.key, octet_length(s.payload) as bytes
      from bridge.scheduled s
      where s.at <= until and (s.at, s.id) > (after_at, after_id)
      order by s.at, s.id limit most
    ), free as materialized (
      select s.event_id from bridge.scheduled s
      where s.event_id = any (array(select d.event_id from due d)) for update skip locked
    ), taken as materialized (
      select d.key, d.at, d.id from due d where d.event_id not in (select f.event_id from free f)
    ), ready as materialized (
      select d.event_id, sum(d.bytes) over (order by d.at, d.id rows unbounded preceding) - d.bytes as bytes_before
      from due d join free f on f.event_id = d.event_id
      where not exists (select from taken t where t.key = d.key and (t.at, t.id) < (d.at, d.id))
    ), gone as (
      delete from bridge.scheduled s using ready r
      where s.event_id = r.event_id and r.bytes_before < most_bytes
      returning s.event_id, s.at, s.id, s.topic, s.key, s.payload, s.content_type, s.headers
    ), stored as (
      insert into bridge.outbox (id, event_id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), g.event_id, g.topic, g.key, g.payload, g.content_type, g.headers
      from (select * from gone order by at, id) g
    )
    select (select count(*) from gone), (select count(*) from due) - (select count(*) from ready), l.at::text, l.id
    into moved, blocked, last_at, last_id
    from (select 1) one left join (select g.at, g.id from gone g order by g.at desc, g.id desc limit 1) l on true;
    if moved > 0 and bridge.somebody_sleeps() then
      perform bridge.ring();
    end if;
  end if;
  next_in := extract(epoch from (
    select s.at from bridge.scheduled s where s.at > until order by s.at, s.id limit 1) - clock_timestamp());
end
$$;
comment on function bridge.move_due(timestamptz, timestamptz, bigint, int, bigint) is
  'Moves a part of the scheduled events that are due into the log.';

create function bridge.scheduled_status(out waiting bigint, out is_exact boolean, out next_at timestamptz)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
  select n.waiting, n.waiting < 100000,
         (select bridge.calendar_time(s.at) from bridge.scheduled s order by s.at, s.id limit 1)
  from (select count(*) as waiting from (select from bridge.scheduled limit 100000) counted) n
$$;
comment on function bridge.scheduled_status() is
  'How many events wait for their time (of 100,000 at most), and when the next is due, which is past where nobody leads.';

-- migrations/0026_backfill.sql ------------------------------------------------------------

-- oldest program: 0024
-- The present rows of a watched table as events, beside its changes: `pgbridge backfill`. Tables that were watched before this
-- migration are to be watched again first, since nothing but their triggers' functions knows what watch() was told.

-- The expression for the key of a row's event: the column's text as in JSON, of several columns the JSON array of their values.
create function bridge.watched_key(entire text, keys text[]) returns text
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return case when cardinality(keys) = 1 then format('%s ->> %L', entire, keys[1])
    else (select format('jsonb_build_array(%s)::text', string_agg(format('%s -> %L', entire, k), ', ' order by n))
          from unnest(keys) with ordinality as u(k, n)) end;

-- As 0020 made it, but that the function's comment says what watch() was told. So it lives and dies with the trigger's function,
-- and is in a dump.
create or replace function bridge.write_capture(operation text, topic text, keys text[], columns text[]) returns text
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  name constant text := format('capture_%s_%s', operation, right(gen_random_uuid()::text, 12));
  needed constant text := format('array[%s]', (select string_agg(quote_literal(c), ', ') from unnest(keys || columns) as c));
  key constant text := bridge.watched_key('c.entire', keys);
  row_text constant text := bridge.watched_part('c.entire', columns) || '::text';
  -- Relations of the catalog have their schema: a trigger made by hand may name a transition table pg_cast. Where the
  -- table's columns are in sight, they must not take the place of the function's variables.
  to_json constant text := format($sql$case when (
               select bridge.refuse_foreign_casts(%I.tg_relid) from pg_catalog.pg_cast as k
               where k.castsource >= 16384 and k.casttarget in ('json'::regtype, 'jsonb'::regtype) limit 1
             ) then null else to_jsonb(r.*) end as entire$sql$, name);
  ours constant text := format($sql$tg_level = 'STATEMENT' and tg_op = %L$sql$, upper(operation));
  payload text;
  source text;
begin
  if operation is null or operation not in ('insert', 'update', 'delete') then
    raise exception 'bridge.write_capture() is for bridge.watch()' using errcode = 'invalid_parameter_value';
  end if;
  perform bridge.check_topic(topic);
  -- Updates: PostgreSQL adds the old and the new row together, so equal positions are pairs, whatever became of the
  -- primary key. One thing breaks it: a row that moves to a partition which refuses it. The join is a full one to find
  -- that, and because it can be no nested loop: the plan that is cached for one row serves 100,000 pairs as well.
  -- OFFSET 0 keeps the planner from repeating to_jsonb() wherever its result is used.
  if operation = 'update' then
    payload := $sql$c.new::text || ', "old": ' || c.old::text || '}'$sql$;
    source := format($sql$(
      select a.entire, a.position = b.position as paired, %1$s as new, %2$s as old
      from (
        select %3$s, row_number() over () as position from new_rows as r
      ) as a
      full join (
        select %3$s, row_number() over () as position from old_rows as r
      ) as b on b.position = a.position
      order by a.position offset 0
    ) as c
    where case when c.paired is not true then bridge.refuse_unpaired_rows(tg_relid)
               when %4$s and c.entire ?& %5$s then c.new <> c.old
               else bridge.refuse_row(c.entire, %5$s, tg_relid) end$sql$,
      bridge.watched_part('a.entire', columns), bridge.watched_part('b.entire', columns), to_json, ours, needed);
  else
    payload := case operation when 'insert' then row_text || $sql$ || ', "old": null}'$sql$
                              else $sql$'null, "old": ' || $sql$ || row_text || $sql$ || '}'$sql$ end;
    source := format($sql$(
      select %1$s from %2$s as r offset 0
    ) as c
    where case when %3$s and c.entire ?& %4$s then true else bridge.refuse_row(c.entire, %4$s, tg_relid) end$sql$,
      to_json, case operation when 'insert' then 'new_rows' else 'old_rows' end, ours, needed);
  end if;

  execute format($sql$create function bridge.%1$I() returns trigger
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- A plan made for a statement of many rows is kept for the next ones, and must not be compiled for its cost.
  set jit = off
as %2$L$sql$, name, format($sql$
-- Written by bridge.watch(), which also replaces it; bridge.unwatch() drops it. For one row, a further statement
-- costs a tenth: so nearly everything is in one.
declare
  head text := format('{"operation": "%1$s", "schema": %%s, "table": %%s, "new": ',
                      to_json(tg_table_schema), to_json(tg_table_name));
  surroundings jsonb := case when bridge.has_context() then bridge.context() else '{}' end;
begin
  insert into bridge.outbox (id, topic, key, payload, content_type, headers)
    -- The transaction id before the sequence's value: see next_outbox_id(). A statement without rows takes none.
    select case when pg_current_xact_id() is not null then nextval('bridge.outbox_id_seq') end, %2$L,
           case when octet_length(%3$s) > bridge.key_limit() then bridge.refuse_watched_key(%3$s, tg_relid)
                else %3$s end,
           head || %4$s, 'application/json', surroundings
    from %5$s;
  if found and bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return null;
end
$sql$, operation, topic, key, payload, source));
  execute format('comment on function bridge.%I() is %L', name,
                 jsonb_build_object('topic', topic, 'keys', keys, 'columns', columns));

  -- The roles may not be there yet when the owner watches its own tables.
  execute format('revoke all on function bridge.%I() from public', name);
  if to_regrole('bridge_operator') is not null then
    execute format('grant execute on function bridge.%I() to bridge_operator', name);
  end if;
  return name;
end
$$;

create table bridge.backfill (
  id          bigint generated always as identity primary key,
  schema_name text not null,
  table_name  text not null,
  relation    oid not null,                  -- this very table: another one may have its name later
  captures    text[] not null,               -- the functions of its watch: every call of watch() makes new ones
  topic       text not null,
  head        text not null,                 -- what every payload begins with
  keys        text[] not null,               -- the columns of the events' keys
  columns     text[],                        -- the watched columns; null: all
  last_key    jsonb,                         -- rows up to this primary key are sent, but for the skipped; texts, in its order
  skipped     jsonb not null default '[]',   -- primary keys of rows that somebody had locked
  walked      boolean not null default false, -- the last row was passed: nothing is left but the skipped
  sent        bigint not null default 0,
  about       bigint not null,               -- how many rows there were, by the planner's estimate
  who         text not null,                 -- as the operating system knows them: user@host
  role        text not null default session_user,
  started_at  timestamptz not null default clock_timestamp(),
  stored_at   timestamptz not null default clock_timestamp(),
  ended_at    timestamptz,
  outcome     text check (outcome in ('finished', 'cancelled', 'restarted')),
  check ((ended_at is null) = (outcome is null))
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
create unique index backfill_once on bridge.backfill (schema_name, table_name) where ended_at is null;
comment on table bridge.backfill is 'Backfills of watched tables: how far each is. One that has not ended goes on where it was.';

-- What watch() was told of a table. `topic` is that of a row that is read: as the other operations', .read in the place of
-- .inserted, or the one that watch() was given. Null where the table's triggers do not agree.
create function bridge.watch_of(
    watched regclass, out captures text[], out operations text[], out topic text, out keys text[], out columns text[])
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  told jsonb[];
begin
  select array_agg(w.name order by w.name), array_agg(distinct w.operation), array_agg(w.told order by w.name),
         case when count(distinct w.topic) = 1 then min(w.topic) end
  into captures, operations, told, topic
  from (
    select n.name, n.operation, n.told,
           case when n.told ->> 'topic' like '%.' || n.suffix
                then left(n.told ->> 'topic', -length(n.suffix)) || 'read' else n.told ->> 'topic' end as topic
    from (
      select p.proname::text as name, split_part(p.proname, '_', 2) as operation,
             bridge.json_object(obj_description(p.oid, 'pg_proc')) as told,
             case split_part(p.proname, '_', 2) when 'insert' then 'inserted' when 'update' then 'updated'
                                                else 'deleted' end as suffix
      from pg_trigger as t join pg_proc as p on p.oid = t.tgfoid
      where t.tgrelid = watched and not t.tgisinternal and t.tgenabled in ('O', 'A')
        and p.pronamespace = 'bridge'::regnamespace and p.proname ~ '^capture(_(insert|update|delete)_[0-9a-f]{12})?$'
    ) as n
  ) as w;
  if captures is null then
    raise exception '% is not watched', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Rows are sent beside their changes, or they would soon be wrong: select bridge.watch(%L).', watched);
  elsif array_position(told, null) is not null then
    raise exception '% was watched by an older version, which did not write down how', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Watch it again, with the topic, key and columns that are wanted: select bridge.watch(%L, ...).', watched);
  elsif (select count(distinct (u.t -> 'keys', u.t -> 'columns')) from unnest(told) as u(t)) > 1 then
    raise exception '% has triggers of bridge.watch() that were told different keys or columns', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Some were made by hand. Watch it again: select bridge.watch(%L, ...).', watched);
  end if;
  keys := array(select jsonb_array_elements_text(told[1] -> 'keys'));
  columns := case when told[1] -> 'columns' <> 'null' then array(select jsonb_array_elements_text(told[1] -> 'columns')) end;
end
$$;
comment on function bridge.watch_of(regclass) is 'What bridge.watch() was told of a table, and the topic of its rows when they are read.';

-- The columns of a primary key, in its order; their types, of a domain the one below it, whose checks are not run again; and
-- the schema of the operators by which its index compares. They are called by that name: a type of an extension would
-- otherwise be compared as what it can be cast to, in another order than that of the index.
create function bridge.primary_key(watched regclass, out names text[], out types text[], out operators text)
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  schemas text[];
begin
  select array_agg(a.attname::text order by k.n), array_agg(format_type(base.oid, -1) order by k.n),
         array_agg(distinct s.nspname::text)
  into names, types, schemas
  from pg_index as i
  cross join lateral unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality as k(attnum, class, n)
  join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
  join pg_opclass as c on c.oid = k.class
  join pg_amop as o on o.amopfamily = c.opcfamily and o.amoplefttype = c.opcintype and o.amoprighttype = c.opcintype
                   and o.amopstrategy = 5 and o.amoppurpose = 's'
  join pg_operator as p on p.oid = o.amopopr
  join pg_namespace as s on s.oid = p.oprnamespace
  cross join lateral (
    with recursive below as (
      select t.oid, t.typtype, t.typbasetype from pg_type as t where t.oid = a.atttypid
      union all
      select t.oid, t.typtype, t.typbasetype from below as b join pg_type as t on t.oid = b.typbasetype where b.typtype = 'd'
    )
    select b.oid from below as b where b.typtype <> 'd'
  ) as base
  where i.indrelid = watched and i.indisprimary and k.n <= i.indnkeyatts;
  if names is null then
    raise exception '% has no primary key, by which a backfill goes through its rows', watched
      using errcode = 'invalid_table_definition', hint = format('Add one: alter table %s add primary key (...).', watched);
  elsif cardinality(schemas) > 1 then
    raise exception 'the columns of the primary key of % are compared by operators of several schemas: %', watched,
        array_to_string(schemas, ', ')
      using errcode = 'feature_not_supported',
            hint = 'A backfill cannot walk along such a key. Emit the rows yourself, each under a lock: select ... for share.';
  end if;
  operators := schemas[1];
end
$$;

-- A condition on the primary key of a row r. The values are literals, which only the types' own input functions read.
create function bridge.key_condition(names text[], types text[], operators text, operator text, value jsonb) returns text
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return (
    select format('(%s) operator(%I.%s) (%s)', string_agg(format('r.%I', u.name), ', ' order by u.n), operators, operator,
                  string_agg(format('%L::%s', value ->> (u.n::int - 1), u.type), ', ' order by u.n))
    from unnest(names, types) with ordinality as u(name, type, n)
  );

-- Records one row; for bridge.backfill_rows(). It reads no table but ours, and what it is given can become an event of a
-- backfill that was begun and nothing else.
create function bridge.record_read(run bigint, key text, row_text text) returns void
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  insert into bridge.outbox (id, topic, key, payload, content_type, headers)
    -- The transaction id before the sequence's value: see next_outbox_id().
    select case when pg_current_xact_id() is not null then nextval('bridge.outbox_id_seq') end, b.topic,
           case when octet_length(record_read.key) > bridge.key_limit()
                then bridge.refuse_watched_key(record_read.key, b.relation::regclass) else record_read.key end,
           b.head || row_text || ', "old": null}', 'application/json', jsonb_build_object('backfill', b.id)
    from bridge.backfill as b where b.id = run and b.ended_at is null;
  if not found then
    raise exception 'the backfill % has ended', run
      using errcode = 'object_not_in_prerequisite_state', hint = 'Somebody has cancelled or restarted it: pgbridge backfill --list.';
  end if;
end
$$;

-- Stores how far a backfill is, in the transaction of its events.
create function bridge.advance_backfill(run bigint, taken bigint, now_last jsonb, now_skipped jsonb, now_walked boolean)
  returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  finished constant boolean := now_walked and now_skipped = '[]';
begin
  update bridge.backfill as b
  set sent = b.sent + taken, last_key = now_last, skipped = now_skipped, walked = now_walked, stored_at = clock_timestamp(),
      ended_at = case when finished then clock_timestamp() end, outcome = case when finished then 'finished' end
  where b.id = run and b.ended_at is null;
  if not found then
    raise exception 'the backfill % has ended', run
      using errcode = 'object_not_in_prerequisite_state', hint = 'Somebody has cancelled or restarted it: pgbridge backfill --list.';
  end if;
  if taken > 0 and bridge.somebody_sleeps() then
    perform bridge.ring();
  end if;
  return finished;
end
$$;

-- Ends the backfill of a table that has not ended. False: there is none.
create function bridge.end_backfill(of_schema text, of_table text, as_outcome text) returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  update bridge.backfill as b set ended_at = clock_timestamp(), outcome = as_outcome
  where b.schema_name = of_schema and b.table_name = of_table and b.ended_at is null;
  return found;
end
$$;

create function bridge.open_backfill(
    of_schema text, of_table text, of_relation oid, its_captures text[], its_topic text, its_keys text[], its_columns text[],
    rows_about bigint, person text)
  returns bigint
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  made bigint;
begin
  perform bridge.check_topic(its_topic);
  insert into bridge.backfill (schema_name, table_name, relation, captures, topic, head, keys, columns, about, who)
  values (of_schema, of_table, of_relation, its_captures, its_topic,
          format('{"operation": "read", "schema": %s, "table": %s, "new": ', to_json(of_schema), to_json(of_table)),
          its_keys, its_columns, rows_about, person)
  returning id into made;
  return made;
end
$$;

-- The lock that the session of a backfill holds.
create function bridge.backfill_lock(of_relation oid) returns bigint
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return hashtextextended('pgbridge backfill ' || of_relation::text, 0);

-- Begins the backfill of a table, or finds the one that has not ended; the session's lock keeps others from it. It is the
-- caller's own rights that decide: so its rows are read by nobody who may not read them.
create function bridge.begin_backfill(
    watched regclass, chosen_topic text, person text, anew boolean, out run bigint, out topic text, out sent bigint,
    out about bigint, out unseen text[], out unkeyed boolean)
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  relation record;
  told record;
  was bridge.backfill;
  names text[];
  plan json;
begin
  select c.relname::text as name, n.nspname::text as schema_name into strict relation
  from pg_class as c join pg_namespace as n on n.oid = c.relnamespace where c.oid = watched;
  told := bridge.watch_of(watched);
  names := (bridge.primary_key(watched)).names;
  if not (has_table_privilege(watched, 'select') and has_any_column_privilege(watched, 'update')) then
    raise exception 'the role % may not read and lock the rows of %', current_user, watched
      using errcode = 'insufficient_privilege',
            hint = format('To lock rows takes the right to update a column. Run it as the owner, or: grant select, update (%s) on %s to %I.',
                          quote_ident(names[1]), watched, current_user);
  elsif row_security_active(watched) then
    raise exception 'row security hides rows of % from the role %', watched, current_user
      using errcode = 'insufficient_privilege',
            hint = 'They would be left out. Run it as the owner of the table or as a role with BYPASSRLS.';
  end if;

  if not pg_try_advisory_lock(bridge.backfill_lock(watched)) then
    raise exception 'a backfill of % runs already', watched
      using errcode = 'object_in_use',
            hint = 'Watch it with: pgbridge backfill --list; or end it: pgbridge backfill TABLE --cancel.';
  end if;
  if anew then
    perform bridge.end_backfill(relation.schema_name, relation.name, 'restarted');
  end if;
  select b.* into was from bridge.backfill as b
  where b.schema_name = relation.schema_name and b.table_name = relation.name and b.ended_at is null;
  unkeyed := not names <@ coalesce(told.columns, names);
  unseen := array(select u.o from unnest(array['insert', 'update', 'delete']) as u(o) where u.o <> all (told.operations));
  if was.id is not null then
    if was.relation <> watched or was.captures <> told.captures then
      raise exception 'since the backfill of % began, the table was % again', watched,
          case when was.relation <> watched then 'made' else 'watched' end
        using errcode = 'object_not_in_prerequisite_state',
              hint = 'Changes of rows that were sent may have passed unseen. Begin anew: --restart.';
    elsif chosen_topic <> was.topic then
      raise exception 'the backfill of % that has not ended has the topic %', watched, quote_literal(was.topic)
        using errcode = 'object_not_in_prerequisite_state',
              hint = 'Leave --topic out to go on with it, or begin anew: --restart.';
    end if;
    run := was.id;
    topic := was.topic;
    sent := was.sent;
    about := was.about;
    return;
  end if;
  topic := coalesce(chosen_topic, told.topic);
  if topic is null then
    raise exception 'the triggers of bridge.watch() of % have topics that do not agree', watched
      using errcode = 'object_not_in_prerequisite_state', hint = 'Name the topic of the rows: --topic TOPIC.';
  end if;
  execute format('explain (format json) select from %s', watched) into plan;
  sent := 0;
  about := (plan -> 0 -> 'Plan' ->> 'Plan Rows')::float8::bigint;
  run := bridge.open_backfill(relation.schema_name, relation.name, watched, told.captures, topic, told.keys, told.columns,
                              about, person);
end
$$;
comment on function bridge.begin_backfill(regclass, text, text, boolean) is
  'For pgbridge backfill: begins one, or finds the one to go on with. `unseen`: operations that are not watched; `unkeyed`: a change '
  'of the primary key may pass unseen.';

-- Records the rows that meet a condition on their primary key, each under its lock, and gives the keys of those that it could
-- not lock. Why no row's event stands before a newer one of it, or behind an older one, is in ARCHITECTURE.md, "Backfill":
-- it takes that the event's id is taken while the row is locked, and that what is recorded was read under the lock. FOR SHARE
-- gives the row's newest version, and a materialized query with it is neither merged with what is above it nor run twice.
create function bridge.backfill_rows(
    run bridge.backfill, watched regclass, condition text, waiting boolean, out taken bigint, out missed jsonb)
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
  set row_security = off
  -- A primary key is stored as text, and must be read as what it was.
  set "DateStyle" = 'ISO'
  set "IntervalStyle" = 'postgres'
  set extra_float_digits = 3
  set bytea_output = 'hex'
  -- Planner: only the primary key may serve.
  set enable_seqscan = off
  set jit = off
as $$
declare
  names constant text[] := (bridge.primary_key(watched)).names;
  own_key constant text := (
    select format('jsonb_build_array(%s)', string_agg(format('format(''%%s'', r.%I)', u.name), ', ' order by u.n))
    from unnest(names) with ordinality as u(name, n));
  ordered constant text := (
    select string_agg(format('r.%I', u.name), ', ' order by u.n) from unnest(names) with ordinality as u(name, n));
begin
  execute format($sql$
    with locked as materialized (
      select %1$s as own_key,
             -- As in the functions that watch() writes: casts are looked for before any row is converted.
             case when (
               select bridge.refuse_foreign_casts(%2$s::oid) from pg_catalog.pg_cast as k
               where k.castsource >= 16384 and k.casttarget in ('json'::regtype, 'jsonb'::regtype) limit 1
             ) then null else to_jsonb(r.*) end as entire
      from %3$s as r where %4$s order by %5$s for share of r %6$s
    ), sent as materialized (
      select l.own_key, bridge.record_read(%7$s, %8$s, %9$s::text) from locked as l
    )
    select (select count(*) from sent),
           coalesce((select jsonb_agg(o.own_key) from (
             select %1$s as own_key from %3$s as r where %4$s
           ) as o where o.own_key not in (select s.own_key from sent as s)), '[]')
  $sql$, own_key, watched::oid, watched, condition, ordered, case when waiting then '' else 'skip locked' end, run.id,
    bridge.watched_key('l.entire', run.keys), bridge.watched_part('l.entire', run.columns)) into taken, missed;
end
$$;

-- A backfill that may go on, and its table; raises what keeps it from that.
create function bridge.require_backfill(run bigint, out b bridge.backfill, out watched regclass)
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  gone text;
begin
  select r.* into b from bridge.backfill as r where r.id = run;
  select c.oid into watched from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
  where c.oid = b.relation and c.relname = b.table_name and n.nspname = b.schema_name;
  if watched is null then
    raise exception 'the table %.% was dropped or renamed', quote_ident(b.schema_name), quote_ident(b.table_name)
      using errcode = 'object_not_in_prerequisite_state',
            hint = 'Under another name it is another backfill; end this one: pgbridge backfill TABLE --cancel.';
  elsif (bridge.watch_of(watched)).captures <> b.captures then
    raise exception 'since the backfill of % began, the table was watched again', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = 'Changes of rows that were sent may have passed unseen. Begin anew: --restart.';
  end if;
  gone := (select string_agg(distinct quote_ident(c), ', ') from unnest(b.keys || b.columns) as c
           where not exists (select from pg_attribute as a where a.attrelid = watched and a.attname = c and not a.attisdropped));
  if gone is not null then
    raise exception 'bridge.watch() was told of the column %, which % no longer has', gone, watched
      using errcode = 'undefined_column',
            hint = format('Watch it again, with the columns that it has now: select bridge.watch(%L, ...); then --restart.', watched);
  end if;
end
$$;

-- The next rows, at most about `most`, in the order of the primary key. Rows that somebody has locked are skipped, and left
-- to backfill_skipped(). No more than `most_skipped` are remembered: then it takes no rows, and left is what is skipped.
create function bridge.backfill_chunk(
    run bigint, most int, most_skipped int, out taken bigint, out skipped bigint, out walked boolean, out finished boolean)
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
  set row_security = off
  set "DateStyle" = 'ISO'
  set "IntervalStyle" = 'postgres'
  set extra_float_digits = 3
  set bytea_output = 'hex'
  set enable_seqscan = off
  set jit = off
as $$
declare
  b bridge.backfill;
  watched regclass;
  found_open record;
  key record;
  above text;
  condition text;
  upper_end jsonb;
  found_rows record;
  missed jsonb;
begin
  found_open := bridge.require_backfill(run);
  b := found_open.b;
  watched := found_open.watched;
  taken := 0;
  walked := b.walked;
  skipped := jsonb_array_length(b.skipped);
  finished := false;
  if walked or skipped >= most_skipped then
    return;
  end if;
  -- The table's lock that rows' locks need comes first: whoever has a stronger one and waits for us would wait for ever otherwise.
  execute format('select from %s as r where false for share of r', watched);
  key := bridge.primary_key(watched);
  above := case when b.last_key is null then 'true'
    else bridge.key_condition(key.names, key.types, key.operators, '>', b.last_key) end;
  -- The end of the chunk is found by a look of its own, without locks: of a row whose primary key is changed meanwhile the
  -- lock would give the new one, which may lie far behind rows that are still to come.
  execute format('select jsonb_build_array(%s) from %s as r where %s order by %s offset %s limit 1',
    (select string_agg(format('format(''%%s'', r.%I)', u.name), ', ' order by u.n) from unnest(key.names) with ordinality as u(name, n)),
    watched, above,
    (select string_agg(format('r.%I', u.name), ', ' order by u.n) from unnest(key.names) with ordinality as u(name, n)),
    greatest(most, 1) - 1) into upper_end;
  walked := upper_end is null;
  condition := above;
  if not walked then
    condition := above || ' and ' || bridge.key_condition(key.names, key.types, key.operators, '<=', upper_end);
  end if;
  found_rows := bridge.backfill_rows(b, watched, condition, false);
  taken := found_rows.taken;
  missed := b.skipped || found_rows.missed;
  skipped := jsonb_array_length(missed);
  finished := bridge.advance_backfill(run, taken, coalesce(upper_end, b.last_key), missed, walked);
end
$$;
comment on function bridge.backfill_chunk(bigint, int, int) is
  'For pgbridge backfill: records the next rows of its table, and how far it is, in this transaction.';

-- Rows that were locked: tries the first ones again; or waits for the lock of one of them, and for no other, so that it can
-- hold nothing that whoever has the lock may wait for. A limit for that wait is the caller's `lock_timeout`.
create function bridge.backfill_skipped(
    run bigint, wait_for int, out taken bigint, out skipped bigint, out walked boolean, out finished boolean)
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  at_once constant int := 100;
  b bridge.backfill;
  watched regclass;
  found_open record;
  key record;
  one record;
  left_over jsonb := '[]';
  found_rows record;
begin
  found_open := bridge.require_backfill(run);
  b := found_open.b;
  watched := found_open.watched;
  key := bridge.primary_key(watched);
  taken := 0;
  for one in
    select e.key, e.n - 1 as place from jsonb_array_elements(b.skipped) with ordinality as e(key, n) order by e.n
  loop
    if coalesce(one.place = wait_for % jsonb_array_length(b.skipped), one.place < at_once) then
      found_rows := bridge.backfill_rows(
        b, watched, bridge.key_condition(key.names, key.types, key.operators, '=', one.key), wait_for is not null);
      taken := taken + found_rows.taken;
      left_over := left_over || found_rows.missed;
    else
      left_over := left_over || jsonb_build_array(one.key);
    end if;
  end loop;
  walked := b.walked;
  skipped := jsonb_array_length(left_over);
  finished := bridge.advance_backfill(run, taken, b.last_key, left_over, b.walked);
end
$$;
comment on function bridge.backfill_skipped(bigint, int) is
  'For pgbridge backfill: records rows that somebody had locked; with `wait_for` one of them, once its lock is free.';

-- How far each sink is behind the end of the log, in ids, and whether it takes the topic.
create function bridge.sinks_behind(event_topic text) returns table (bridge text, sink text, takes boolean, behind bigint)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  -- The log's last row, and not the sequence: ids that were rolled back are nothing that a sink could come to.
  select c.name, c.sink, taken.regex is null or ('.' || event_topic) ~ taken.regex,
         greatest(coalesce((select max(o.id) from bridge.outbox as o), 0) - c.mark, 0)
  from bridge.cursor as c cross join lateral (select bridge.topic_regex(c.patterns) as regex) as taken
  where c.sink <> ''
$$;
comment on function bridge.sinks_behind(text) is 'How far each sink is behind the end of the log, and whether it takes a topic.';

-- migrations/0027_event_schemas.sql ------------------------------------------------------------

-- oldest program: 0024
-- What this database emits, for `pgbridge asyncapi`: what bridge.watch() was told of every table, and schemas that somebody
-- registers for events that are emitted by hand. They document: emit() looks at none of them, and costs what it did.

create table bridge.event_schema (
  topic         text primary key,
  schema        json not null,        -- a JSON Schema, as its author wrote it
  description   text not null,
  content_type  text not null check (content_type in ('application/json', 'text/plain')),
  registered_by text not null default session_user,
  registered_at timestamptz not null default clock_timestamp()
);
comment on table bridge.event_schema is 'Schemas of events that are emitted by hand, for pgbridge asyncapi. No event is compared with them.';

-- Whether the items of an array are strings, each once.
create function bridge.are_distinct_strings(items jsonb) returns boolean
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return (select count(*) filter (where jsonb_typeof(i.item) = 'string') = count(*) and count(distinct i.item) = count(*)
          from jsonb_array_elements(case when jsonb_typeof(items) = 'array' then items else '[0]' end) as i(item));

-- What a keyword of JSON Schema (draft-07) must hold, where it holds something else; null where it is right, and for a word
-- that is no keyword. What stands in it is not looked at.
create function bridge.json_schema_wants(keyword text, held jsonb) returns text
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  kind constant text := jsonb_typeof(held);
  types constant jsonb := '["null", "boolean", "object", "array", "number", "string", "integer"]';
begin
  return case
    when keyword = 'type' and not case kind when 'string' then held <@ types
                                            when 'array' then held <@ types and held <> '[]' and bridge.are_distinct_strings(held)
                                            else false end
      then 'must be null, boolean, object, array, number, string or integer, or an array of some of them'
    when keyword in ('properties', 'patternProperties', 'definitions', '$defs', 'dependencies') and kind <> 'object'
      then 'must be an object, with a schema under each name'
    when keyword in ('allOf', 'anyOf', 'oneOf') and (kind <> 'array' or held = '[]') then 'must be an array of schemas'
    when keyword = 'items' and held = '[]' then 'must be a schema, or an array of some'
    when keyword = 'required' and not bridge.are_distinct_strings(held) then 'must be an array of names, each once'
    when keyword = 'enum' and (kind <> 'array' or held = '[]') then 'must be an array of values'
    when keyword = 'examples' and kind <> 'array' then 'must be an array'
    when keyword in ('title', 'description', '$comment', 'format', 'pattern', 'contentEncoding', 'contentMediaType', '$ref',
                     'discriminator') and kind <> 'string' then 'must be a string'
    when keyword in ('minLength', 'maxLength', 'minItems', 'maxItems', 'minProperties', 'maxProperties')
         and not (kind = 'number' and held::text ~ '^\d+(\.0+)?$') then 'must be a whole number, of zero or more'
    when keyword in ('minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum') and kind <> 'number' then 'must be a number'
    when keyword = 'multipleOf' and not case kind when 'number' then held::numeric > 0 else false end
      then 'must be a number above zero'
    when keyword in ('uniqueItems', 'readOnly', 'writeOnly', 'deprecated') and kind <> 'boolean' then 'must be true or false'
    when keyword in ('prefixItems', 'unevaluatedItems', 'unevaluatedProperties', 'dependentSchemas', 'dependentRequired',
                     'minContains', 'maxContains', '$anchor', '$dynamicRef', '$dynamicAnchor', '$recursiveRef')
      then 'is of a later draft of JSON Schema; AsyncAPI has draft-07'
    when keyword in ('$id', '$schema') then 'may stand at the top only'
    when keyword = 'externalDocs' then 'is not taken; write it into the description'
  end;
end
$$;

-- A $ref that leads nowhere in the schema; null where each leads somewhere. Those in examples and constants count: whoever reads
-- the document follows them, too.
create function bridge.stray_ref(schema jsonb) returns text
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return (
    select r.target
    from jsonb_path_query(schema, '$.** ? (@.type() == "object").keyvalue() ? (@.key == "$ref" && @.value.type() == "string")') as k(ref)
    cross join lateral (select k.ref ->> 'value') as r(target)
    where r.target !~ '^#(/|$)' or r.target <> '#' and schema #> array(
      select replace(replace(p.part, '~1', '/'), '~0', '~')
      from unnest((string_to_array(r.target, '/'))[2:]) with ordinality as p(part, n) order by p.n) is null
    limit 1
  );

-- What is wrong with a JSON Schema, with the place as a JSON pointer; null where nothing is.
create function bridge.json_schema_fault(schema jsonb, place text) returns text
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  word record;
  part record;
  fault text;
begin
  if jsonb_typeof(schema) = 'boolean' then
    return null;
  elsif jsonb_typeof(schema) <> 'object' then
    return format('%s is a JSON %s; a schema is an object, or true or false', place, jsonb_typeof(schema));
  end if;
  for word in
    select e.key, e.value as held, jsonb_typeof(e.value) as kind,
           format('%s/%s', place, replace(replace(e.key, '~', '~0'), '/', '~1')) as place
    from jsonb_each(schema) as e
  loop
    fault := bridge.json_schema_wants(word.key, word.held);
    if fault is not null then
      return format('%s %s', word.place, fault);
    end if;
    for part in
      select word.held as held, word.place as place
      where word.key in ('additionalItems', 'additionalProperties', 'contains', 'propertyNames', 'not', 'if', 'then', 'else')
         or word.key = 'items' and word.kind <> 'array'
      union all
      select i.held, format('%s/%s', word.place, i.n - 1)
      from jsonb_array_elements(case when word.kind = 'array' then word.held else '[]' end) with ordinality as i(held, n)
      where word.key in ('allOf', 'anyOf', 'oneOf', 'items')
      union all
      select e.value, format('%s/%s', word.place, replace(replace(e.key, '~', '~0'), '/', '~1'))
      from jsonb_each(case when word.kind = 'object' then word.held else '{}' end) as e
      where word.key in ('properties', 'patternProperties', 'definitions', '$defs')
         or word.key = 'dependencies' and not bridge.are_distinct_strings(e.value)
    loop
      fault := bridge.json_schema_fault(part.held, part.place);
      if fault is not null then
        return fault;
      end if;
    end loop;
  end loop;
  return null;
end
$$;

create function bridge.register_schema(
    topic text, schema json, description text default '', content_type text default 'application/json') returns void
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  parsed constant jsonb := schema::jsonb;
  draft constant text := case when jsonb_typeof(parsed) = 'object' then parsed ->> '$schema' end;
  fault text;
begin
  perform bridge.check_topic(topic);
  if string_to_array(topic, '.') && array['*', '#', '>'] then
    raise exception 'a schema is registered for one topic, and % is a pattern', quote_literal(topic)
      using errcode = 'invalid_parameter_value', hint = 'Give the topic that emit() is given, such as shop.order.placed.';
  elsif content_type is null or content_type not in ('application/json', 'text/plain') then
    raise exception 'the content type of topic % is %', quote_literal(topic), coalesce(quote_literal(content_type), 'null')
      using errcode = 'invalid_parameter_value',
            hint = 'Events of emit() with json or jsonb are application/json; with text, and those of notify(), text/plain.';
  elsif schema is null then
    raise exception 'the schema of topic % is null', quote_literal(topic)
      using errcode = 'null_value_not_allowed', hint = 'Give a JSON Schema, or call bridge.unregister_schema().';
  end if;
  fault := case
    when jsonb_typeof(parsed) <> 'object' then format('it is a JSON %s, and not an object', jsonb_typeof(parsed))
    when draft !~ '^https?://json-schema\.org/draft-07/schema#?$' then
      format('#/$schema is %s, and AsyncAPI has draft-07 (http://json-schema.org/draft-07/schema#)', quote_literal(draft))
    when bridge.stray_ref(parsed) is not null then
      format('a $ref leads to %s, which is not in it; put it under definitions, and write #/definitions/...',
             quote_literal(bridge.stray_ref(parsed)))
    else bridge.json_schema_fault(parsed - '{$schema,$id}'::text[], '#') end;
  if fault is not null then
    raise exception 'the schema of topic % is no JSON Schema: %', quote_literal(topic), fault
      using errcode = 'invalid_parameter_value',
            hint = 'Such as: {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}';
  end if;
  insert into bridge.event_schema (topic, schema, description, content_type)
    values (register_schema.topic, register_schema.schema, coalesce(register_schema.description, ''), register_schema.content_type)
  on conflict on constraint event_schema_pkey do update
    set schema = excluded.schema, description = excluded.description, content_type = excluded.content_type,
        registered_by = excluded.registered_by, registered_at = excluded.registered_at;
end
$$;
comment on function bridge.register_schema(text, json, text, text) is
  'Says what the payload of a topic''s events is, as a JSON Schema (draft-07), for pgbridge asyncapi. It replaces what was said before; no event is compared with it.';

create function bridge.unregister_schema(topic text) returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  delete from bridge.event_schema as s where s.topic = unregister_schema.topic;
  return found;
end
$$;
comment on function bridge.unregister_schema(text) is 'Forgets the schema of a topic. False: none is registered.';

-- The triggers of watch(), of one table or of all, that are enabled. `told` is what watch() was told; null where an older version
-- did not write it down.
create function bridge.watches(of_table regclass default null)
  returns table (watched regclass, capture text, operation text, told jsonb)
  language sql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select t.tgrelid::regclass, p.proname::text,
         case when t.tgtype & 4 > 0 then 'insert' when t.tgtype & 8 > 0 then 'delete' else 'update' end,
         bridge.json_object(obj_description(p.oid, 'pg_proc'))
  from pg_trigger as t join pg_proc as p on p.oid = t.tgfoid
  where (of_table is null or t.tgrelid = of_table) and not t.tgisinternal and t.tgenabled in ('O', 'A')
    and p.pronamespace = 'bridge'::regnamespace and p.proname ~ '^capture(_(insert|update|delete)_[0-9a-f]{12})?$'
$$;
comment on function bridge.watches(regclass) is 'What bridge.watch() was told: one row for each table and operation.';

-- As 0026 made it, over watches().
create or replace function bridge.watch_of(
    watched regclass, out captures text[], out operations text[], out topic text, out keys text[], out columns text[])
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  told jsonb[];
begin
  select array_agg(w.capture order by w.capture), array_agg(distinct w.operation), array_agg(w.told order by w.capture),
         case when count(distinct w.topic) = 1 then min(w.topic) end
  into captures, operations, told, topic
  from (
    select n.capture, n.operation, n.told,
           case when n.told ->> 'topic' like '%.' || n.suffix
                then left(n.told ->> 'topic', -length(n.suffix)) || 'read' else n.told ->> 'topic' end as topic
    from (
      select c.capture, c.operation, c.told,
             case c.operation when 'insert' then 'inserted' when 'update' then 'updated' else 'deleted' end as suffix
      from bridge.watches(watched) as c
    ) as n
  ) as w;
  if captures is null then
    raise exception '% is not watched', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Rows are sent beside their changes, or they would soon be wrong: select bridge.watch(%L).', watched);
  elsif array_position(told, null) is not null then
    raise exception '% was watched by an older version, which did not write down how', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Watch it again, with the topic, key and columns that are wanted: select bridge.watch(%L, ...).', watched);
  elsif (select count(distinct (u.t -> 'keys', u.t -> 'columns')) from unnest(told) as u(t)) > 1 then
    raise exception '% has triggers of bridge.watch() that were told different keys or columns', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Some were made by hand. Watch it again: select bridge.watch(%L, ...).', watched);
  end if;
  keys := array(select jsonb_array_elements_text(told[1] -> 'keys'));
  columns := case when told[1] -> 'columns' <> 'null' then array(select jsonb_array_elements_text(told[1] -> 'columns')) end;
end
$$;

-- migrations/0028_samples.sql ------------------------------------------------------------

-- oldest program: 0024
-- Samples for charts, which the leaders and the workers write; and looking through the log, a part at a time.

-- Samples. -------------------------------------------------------------------------------------------------

create table bridge.sample (
  step    int not null check (step in (15, 300, 3600)),
  kind    text not null check (kind in ('bridge', 'sink', 'worker')),
  bridge  text not null,
  name    text not null,
  at      timestamptz not null,
  seconds double precision not null,
  counts  jsonb not null,
  levels  jsonb not null,
  primary key (step, kind, bridge, name, at)
) with (
  -- A row is updated as long as its time lasts; with room in the page, no index is written for that.
  fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
  autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000
);
create index sample_at on bridge.sample (step, at);
comment on table bridge.sample is
  'What leaders and workers counted, for charts: a day by 15 seconds, three by 5 minutes, thirty by the hour.';
comment on column bridge.sample.step is 'How many seconds the row is for, from `at` on.';
comment on column bridge.sample.bridge is 'Empty for a worker, whose inbox is no bridge''s.';
comment on column bridge.sample.name is 'The sink''s or the worker''s; empty for a bridge itself, and for the sink that finds what no route takes.';
comment on column bridge.sample.seconds is 'For how long something was counted, over all processes.';
comment on column bridge.sample.counts is 'What can be added: over processes, and over time.';
comment on column bridge.sample.levels is 'The highest that was seen.';

create function bridge.add_counts(a jsonb, b jsonb) returns jsonb
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select coalesce(jsonb_object_agg(t.key, t.total), '{}')
  from (select e.key, sum(e.value::double precision) as total
        from (select * from jsonb_each_text(a) union all select * from jsonb_each_text(b)) e group by e.key) t
$$;

create function bridge.highest_levels(a jsonb, b jsonb) returns jsonb
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select coalesce(jsonb_object_agg(t.key, t.highest), '{}')
  from (select e.key, max(e.value::double precision) as highest
        from (select * from jsonb_each_text(a) union all select * from jsonb_each_text(b)) e group by e.key) t
$$;

-- Adds to the rows of the present, one of each step, and deletes some that are past their time: more than it makes, and
-- anybody's, so that the table is bounded whoever writes. False where there are as many names as there may be.
create function bridge.add_sample(
    sample_kind text, bridge_name text, sample_name text, covered double precision, new_counts jsonb, new_levels jsonb)
  returns boolean
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
  -- Planner: estimates on a table that empties at one end are always stale.
  set enable_seqscan = off
as $$
declare
  most_names constant int := 300;
  most_bytes constant int := 4000;
  present constant timestamptz := clock_timestamp();
  one record;
begin
  if jsonb_path_exists(jsonb_build_array(new_counts, new_levels), '$[*].* ? (@.type() != "number")')
     or jsonb_typeof(new_counts) <> 'object' or jsonb_typeof(new_levels) <> 'object'
     or octet_length(new_counts::text) + octet_length(new_levels::text) > most_bytes or length(sample_name) > 255 then
    raise exception 'a sample is an object of numbers for counts and one for levels, of % bytes at most', most_bytes
      using errcode = 'invalid_parameter_value';
  end if;
  for one in
    select t.step, t.keep, to_timestamp(floor(extract(epoch from present) / t.step) * t.step) as at
    from (values (15, interval '1 day'), (300, interval '3 days'), (3600, interval '30 days')) t (step, keep)
  loop
    update bridge.sample s
    set seconds = s.seconds + covered, counts = bridge.add_counts(s.counts, new_counts),
        levels = bridge.highest_levels(s.levels, new_levels)
    where s.step = one.step and s.kind = sample_kind and s.bridge = bridge_name and s.name = sample_name and s.at = one.at;
    if not found then
      if (select count(*) from (
            select from bridge.sample s where s.step = one.step and s.at = one.at limit most_names) n) = most_names then
        return false;
      end if;
      insert into bridge.sample as s (step, kind, bridge, name, at, seconds, counts, levels)
        values (one.step, sample_kind, bridge_name, sample_name, one.at, covered, new_counts, new_levels)
        on conflict (step, kind, bridge, name, at) do update
        set seconds = s.seconds + excluded.seconds, counts = bridge.add_counts(s.counts, excluded.counts),
            levels = bridge.highest_levels(s.levels, excluded.levels);
      delete from bridge.sample d where d.ctid = any (array(
        select s.ctid from bridge.sample s where s.step = one.step and s.at < present - one.keep
        order by s.at limit 20 for update skip locked));
    end if;
  end loop;
  return true;
end
$$;

-- Everybody writes once within each 15 seconds, away from their ends, so that each has one sample of each process; where
-- within, is `phase`, from 0 to 1. By this clock, since those of the processes differ.
create function bridge.next_sample(phase double precision) returns double precision
  language sql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select 15 - e.now + floor(e.now / 15) * 15 + 15 * (0.2 + 0.6 * least(greatest(phase, 0), 1))
  from (select extract(epoch from clock_timestamp())::double precision as now) e
$$;

-- A sample of a bridge and its sinks; what has no name is for the bridge itself. `next_in`: seconds until the next one is due.
create function bridge.store_samples(
    bridge_name text, names text[], covered double precision, new_counts jsonb[], new_levels jsonb[],
    phase double precision, out left_out int, out next_in double precision)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  set lock_timeout = '1s'
as $$
declare
  n int;
begin
  -- Nothing waits for the disk: a crash of the server may forget the last ones.
  perform set_config('synchronous_commit', 'off', true);
  left_out := 0;
  for n in 1 .. cardinality(names) loop
    if not bridge.add_sample(case when names[n] is null then 'bridge' else 'sink' end, bridge_name, coalesce(names[n], ''),
                             covered, new_counts[n], new_levels[n]) then
      left_out := left_out + 1;
    end if;
  end loop;
  next_in := bridge.next_sample(phase);
end
$$;
comment on function bridge.store_samples(text, text[], double precision, jsonb[], jsonb[], double precision) is
  'Adds what the leader of a bridge has counted of it and its sinks to the samples for charts.';

create function bridge.store_worker_sample(
    worker_name text, covered double precision, new_counts jsonb, new_levels jsonb, phase double precision,
    out left_out int, out next_in double precision)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  set lock_timeout = '1s'
as $$
begin
  perform set_config('synchronous_commit', 'off', true);
  left_out := (not bridge.add_sample('worker', '', worker_name, covered, new_counts, new_levels))::int;
  next_in := bridge.next_sample(phase);
end
$$;
comment on function bridge.store_worker_sample(text, double precision, jsonb, jsonb, double precision) is
  'Adds what a process of a worker has counted to the samples for charts.';

-- Looking through the log. ---------------------------------------------------------------------------------

-- One part of a search, the newest first: of the rows from `above` on and below `before`, the first `chunk` are looked at,
-- and `most` of those that fit are given. Whatever is null fits everything. Before a text is looked for in them, what else
-- is asked must fit; the payloads that are read for it are of `most_bytes` in all, or one. So a part is some milliseconds,
-- whatever the log holds: it has no index but its primary key, since every emit() would pay for one.
-- `looked` and `next_before`, where to go on, are in every row, and there is always one; its `id` is null where nothing fits.
create function bridge.search_events(
    before bigint, above bigint, chunk int, most int, most_bytes bigint, topics text[], event_key text, since timestamptz,
    until timestamptz, header text, header_value text, wanted text)
  returns table (
    looked bigint, next_before bigint, id bigint, event_id uuid, topic text, key text, content_type text, bytes bigint,
    recorded_at timestamptz, head text)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
  with taken as materialized (
    select bridge.topic_regex(topics) as regex
  ), part as materialized (
    select o.id, case when wanted is not null then octet_length(o.payload) else 0 end as bytes,
      (taken.regex is null or ('.' || o.topic) ~ taken.regex)
      and (event_key is null or o.key = event_key)
      and (since is null or o.created_at >= since) and (until is null or o.created_at < until)
      and (header is null or coalesce(case when header_value is null then o.headers ? header
                                           else o.headers ->> header = header_value end, false)) as fits
    from taken, bridge.outbox o where o.id < before and o.id >= above order by o.id desc limit chunk
  ), summed as materialized (
    select p.id, p.fits,
      coalesce(sum(p.bytes) filter (where p.fits) over (order by p.id desc rows between unbounded preceding and 1 preceding), 0)
        as bytes_before
    from part p
  ), seen as materialized (
    select s.id, coalesce(s.fits, false) as fits from summed s where s.bytes_before < most_bytes
  ), found as (
    select o.id, o.event_id, o.topic, o.key, o.content_type, octet_length(o.payload)::bigint as bytes,
      bridge.calendar_time(o.created_at) as recorded_at, left(o.payload, 200) as head
    from (select e.id from seen e where e.fits order by e.id desc limit case when wanted is null then most end) s
    cross join lateral (select n.* from bridge.outbox n where n.id = s.id offset 0) o
    where wanted is null or position(wanted in o.payload) > 0
    order by s.id desc limit most
  )
  select n.looked, n.next_before, f.*
  from (select count(*) as looked, min(s.id) as next_before from seen s) n left join found f on true
  order by f.id desc
$$;
comment on function bridge.search_events(
    bigint, bigint, int, int, bigint, text[], text, timestamptz, timestamptz, text, text, text) is
  'Looks for events in one part of the log, the newest first.';

-- The nearest events of a key, among the `bound` rows of the log before an event and the `bound` behind it.
create function bridge.event_neighbours(number bigint, event_key text, most int, bound int)
  returns table (id bigint, event_id uuid, topic text, bytes bigint, recorded_at timestamptz)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
  with near as materialized (
    (select b.id from (select o.id, o.key from bridge.outbox o where o.id < number order by o.id desc limit bound) b
     where b.key = event_key order by b.id desc limit most)
    union all
    (select a.id from (select o.id, o.key from bridge.outbox o where o.id > number order by o.id limit bound) a
     where a.key = event_key order by a.id limit most)
  )
  select o.id, o.event_id, o.topic, octet_length(o.payload)::bigint, bridge.calendar_time(o.created_at)
  from near n join bridge.outbox o on o.id = n.id order by o.id
$$;
comment on function bridge.event_neighbours(bigint, text, int, int) is
  'The nearest events of a key before and behind one event of the log, among so many of each.';

create function bridge.event_content(number bigint, most int)
  returns table (payload text, is_whole boolean, headers jsonb)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select left(o.payload, most), length(left(o.payload, most + 1)) <= most, o.headers
  from bridge.outbox o where o.id = number
$$;
comment on function bridge.event_content(bigint, int) is
  'Headers of one event of the log, and its payload up to so many characters.';

-- migrations/0029_counts.sql ------------------------------------------------------------

-- oldest program: 0024
-- How far to count is the caller's to say: whoever looks every two seconds counts less far than whoever looks once.

-- Where each sink of each bridge is. It counts `counted` events of each sink at most, in what is late and in what is ahead
-- of the mark. A longer backlog is then reckoned: as large a part of the ids ahead as of those that were counted.
create function bridge.status(counted int)
  returns table (
    name text, sink text, leader text, leader_since timestamptz, leads boolean, mark bigint, last_id bigint,
    gaps bigint, held bigint, backlog bigint, backlog_exact boolean, oldest_unsent_at timestamptz,
    stored_at timestamptz, asleep boolean, problem text, problem_since timestamptz, dead_letters bigint
  )
  language plpgsql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  c record;
  taken text;
  inverted boolean;
  late bigint;
  late_at timestamptz;
  ahead bigint;
  ahead_at timestamptz;
  seen bigint;
begin
  last_id := coalesce((select max(o.id) from bridge.outbox o), 0);
  for c in
    select cu.*, l.who, l.since from bridge.cursor cu left join bridge.leader l on l.name = cu.name
    order by cu.name, cu.sink
  loop
    if name is distinct from c.name then
      name := c.name;
      -- The row says who led last; only the lock says whether that session lives.
      leads := exists (
        select from pg_locks l
        where l.locktype = 'advisory' and l.granted and l.objsubid = 1
          and l.database = (select d.oid from pg_database d where d.datname = current_database())
          and (l.classid::bigint << 32) + l.objid::bigint = bridge.lead_key(c.name));
      dead_letters := (select count(*) from bridge.dead_letter d where d.bridge = c.name);
      asleep := coalesce((select b.asleep from bridge.bell b where b.name = c.name), true);
    end if;
    sink := c.sink; mark := c.mark; stored_at := c.stored_at;
    gaps := (select coalesce(sum(upper(g) - lower(g)), 0) from unnest(c.gaps + c.old_gaps) g);
    held := (select coalesce(sum(upper(h) - lower(h)), 0) from unnest(c.held) h);
    leader := case when leads then c.who end;
    leader_since := case when leads then c.since end;
    problem := case when leads then c.problem end;
    problem_since := case when leads then c.problem_since end;

    taken := bridge.topic_regex(c.patterns);
    inverted := c.sink = '';
    select count(*) filter (where n.is_taken), min(n.created_at) filter (where n.is_taken), count(*)
      into late, late_at, seen
      from (
        select r.created_at, taken is null or (('.' || r.topic) ~ taken) <> inverted as is_taken
        from unnest(c.gaps + c.old_gaps + c.held) g,
             lateral (select o.created_at, o.topic from bridge.outbox o where o.id >= lower(g) and o.id < upper(g)
                      order by o.id limit counted) r
        limit counted) n;
    backlog_exact := seen < counted;
    if not backlog_exact then
      late := greatest(late, held);
    end if;
    select count(*) filter (where n.is_taken), min(n.created_at) filter (where n.is_taken), count(*)
      into ahead, ahead_at, seen
      from (select o.created_at, taken is null or (('.' || o.topic) ~ taken) <> inverted as is_taken
            from bridge.outbox o where o.id > c.mark order by o.id limit counted) n;
    if seen >= counted then
      backlog_exact := false;
      ahead := greatest(ahead, round(ahead::numeric / seen * (last_id - c.mark)));
    end if;
    backlog := late + ahead;
    oldest_unsent_at := bridge.calendar_time(least(late_at, ahead_at));
    return next;
  end loop;
end
$$;
comment on function bridge.status(int) is
  'Where each sink of each bridge is; a backlog of more events than this is reckoned and not counted.';

-- Programs before this migration ask so.
create or replace function bridge.status()
  returns table (
    name text, sink text, leader text, leader_since timestamptz, leads boolean, mark bigint, last_id bigint,
    gaps bigint, held bigint, backlog bigint, backlog_exact boolean, oldest_unsent_at timestamptz,
    stored_at timestamptz, asleep boolean, problem text, problem_since timestamptz, dead_letters bigint
  )
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select * from bridge.status(100000)
$$;

-- What waits for another attempt, and what was given up, however long ago it was begun. An event that is handled at its
-- first attempt is never in this index, and its updates stay within the page: they change none of these columns.
create index inbox_apart on bridge.inbox (worker)
  where due_at is not null or failure is not null or ended_at is not null;

-- How workers stand. What runs, and what was finished, is counted among the `counted` events that were begun last, since an
-- index over what is not finished would be written at the beginning and at the end of each event; `is_exact` is false
-- where there are more. What waits for another attempt, what was given up and held keys are found wherever they are, so
-- many of all workers.
create function bridge.worker_status(named text[], counted int)
  returns table (
    worker text, running bigint, waiting bigint, finished_last_hour bigint, dead_letters bigint, held_keys bigint,
    paused_since timestamptz, paused_by text, paused_why text, is_exact boolean)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_sort = off
as $$
  with recursive recent as materialized (
    select i.worker, i.claim, i.finished_at, i.due_at is not null or i.failure is not null or i.ended_at is not null as apart
    from bridge.inbox i order by i.started_at desc limit counted
  ),
  apart as materialized (
    select i.worker, i.event_id, i.ended_at, i.failure is not null as failed
    from bridge.inbox i
    where (i.due_at is not null or i.failure is not null or i.ended_at is not null) and i.finished_at is null
    limit counted
  ),
  living as materialized (select t.token from bridge.living_tokens() t),
  lines as (
    (select h.line, h.worker from bridge.held h order by h.line, h.worker limit 1)
    union all
    select following.line, following.worker from lines l cross join lateral (
      select h.line, h.worker from bridge.held h where (h.line, h.worker) > (l.line, l.worker)
      order by h.line, h.worker limit 1) as following
  ),
  held as materialized (select l.worker from lines l limit counted),
  counts as (
    select r.worker,
           count(*) filter (where r.open and r.lives) as running,
           count(*) filter (where r.open and not r.lives) as waiting,
           count(*) filter (where r.finished_at > clock_timestamp() - interval '1 hour') as finished
    from (
      select n.*, n.finished_at is null and not n.apart as open,
             n.claim is not null and n.claim in (select l.token from living l) as lives
      from recent n
    ) r
    group by r.worker
  ),
  counts_apart as (
    select e.worker,
           count(*) filter (where not e.failed and e.ended_at is null) as waiting,
           count(*) filter (where e.failed or e.ended_at is not null and not exists (
             select from bridge.dead_letter_audit a
             where a.event_id = e.event_id and a.letter = e.worker || ':' || e.event_id::text
               and a.action = 'discarded' and a.at > e.ended_at)) as dead
    from apart e
    group by e.worker
  )
  select w.worker, coalesce(c.running, 0), coalesce(c.waiting, 0) + coalesce(e.waiting, 0), coalesce(c.finished, 0),
         coalesce(e.dead, 0), (select count(*) from held h where h.worker = w.worker), p.since, p.who, p.why,
         (select count(*) < counted from recent)
  from (select unnest(named) as worker union select bridge.inbox_workers()) w
  left join counts c on c.worker = w.worker
  left join counts_apart e on e.worker = w.worker
  left join bridge.pause p on p.kind = 'worker' and p.bridge = '' and p.name = w.worker
  order by w.worker
$$;
comment on function bridge.worker_status(text[], int) is
  'How these workers stand, and all that have an inbox; what runs and was finished, of so many events begun last.';

-- Programs before this migration ask so.
create or replace function bridge.worker_status(named text[])
  returns table (
    worker text, running bigint, waiting bigint, finished_last_hour bigint, dead_letters bigint, held_keys bigint,
    paused_since timestamptz, paused_by text, paused_why text, is_exact boolean)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select * from bridge.worker_status(named, 100000)
$$;

-- migrations/0030_workers_and_webhooks.sql ------------------------------------------------------------

-- oldest program: 0024
-- What people look at of workers and of webhooks, with a bound on what is looked at, whatever the tables hold.

-- Workers. -------------------------------------------------------------------------------------------------

-- Outside effects of an inbox row that were begun and have no outcome: the operation, and since when.
create function bridge.effects_without_outcome(effects jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, bridge, pg_temp as $$
    select coalesce(jsonb_object_agg(e.key, e.value ->> 'started_at'), '{}')
    from jsonb_each(effects) e where e.value ? 'started_at' and not e.value ? 'result'
$$;

-- What the workers with these names have in hand, and what of it waits, among the `look_at` events that were begun last, of
-- all workers together; see worker_status() for why there is no index. A row for each process, which is a session of
-- PostgreSQL that holds a token, and one without a pid for what no living process has.
create function bridge.worker_processes(named text[], look_at int)
returns table (
    worker text, pid int, since timestamptz, address inet, in_hand bigint, oldest_at timestamptz, waiting bigint,
    next_due_at timestamptz, open_effects bigint)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp
set enable_seqscan = off as $$
    with sessions as materialized (
        -- The name of a session is cut at 63 bytes.
        select n.worker, t.token, a.pid, a.backend_start, a.client_addr
        from bridge.living_tokens() t join pg_stat_activity a on a.pid = t.pid
        join unnest(named) n (worker) on a.application_name = left('pgbridge-worker ' || n.worker, 63)
    ), counted as (
        select r.worker, s.pid,
            count(*) filter (where r.goes_on and s.pid is not null) as in_hand,
            min(r.started_at) filter (where r.goes_on and s.pid is not null) as oldest_at,
            count(*) filter (where r.goes_on and s.pid is null) as waiting,
            min(r.due_at) filter (where r.goes_on and s.pid is null) as next_due_at,
            count(*) filter (where r.effects <> '{}' and bridge.effects_without_outcome(r.effects) <> '{}') as open_effects
        from (
            select i.worker, i.claim, i.started_at, i.due_at, i.effects, i.finished_at,
                i.failure is null and i.ended_at is null as goes_on
            from bridge.inbox i order by i.started_at desc limit look_at
        ) r left join sessions s on s.worker = r.worker and s.token = r.claim
        where r.finished_at is null and r.worker = any (named)
        group by r.worker, s.pid
    )
    select coalesce(c.worker, s.worker), coalesce(c.pid, s.pid), s.backend_start, s.client_addr, coalesce(c.in_hand, 0),
        c.oldest_at, coalesce(c.waiting, 0), c.next_due_at, coalesce(c.open_effects, 0)
    from counted c full join sessions s on s.worker = c.worker and s.pid = c.pid
    order by 1, 2 nulls last
$$;
comment on function bridge.worker_processes(text[], int) is
    'The processes of these workers, and what they have in hand of so many events that were begun last.';

-- Events of one worker, of the `look_at` that were begun last, and of as many that wait or were given up, whenever they
-- were begun; in parts of `most` at most:
--   running   what living processes have, the oldest first
--   waiting   for another attempt, what is due next first
--   effects   what has an effect that was begun and has no outcome, the oldest first; it is in another part, too
--   failed    dead letters, also such as the broker has not taken yet, the latest first
--   finished  the latest first
create function bridge.worker_events(worker_name text, look_at int, most int)
returns table (
    part text, event_id uuid, attempts int, started_at timestamptz, finished_at timestamptz, due_at timestamptz,
    ended_at timestamptz, pid int, code text, reason text, open_effects jsonb)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp
set enable_seqscan = off as $$
    with known as materialized (
        select r.*, l.pid,
            case when r.finished_at is not null then 'finished'
                 when r.failed then 'failed'
                 when l.pid is not null then 'running'
                 else 'waiting' end as state
        from (
            select i.worker, i.event_id, i.claim, i.attempts, i.started_at, i.finished_at, i.due_at, i.ended_at,
                i.failure is not null or i.ended_at is not null as failed, i.failure,
                case when i.finished_at is null then i.effects else '{}' end as effects
            from (
                select * from (select * from bridge.inbox o order by o.started_at desc limit look_at) latest
                where latest.due_at is null and latest.failure is null and latest.ended_at is null
                union all
                (select * from bridge.inbox o
                 where (o.due_at is not null or o.failure is not null or o.ended_at is not null) and o.worker = worker_name
                 limit look_at)
            ) i
        ) r left join bridge.living_tokens() l on l.token = r.claim
        where r.worker = worker_name
    ), parts as (
        (select 1 as part, k.*, null::jsonb as open_effects from known k where k.state = 'running'
         order by k.started_at limit most)
        union all
        (select 2, k.*, null from known k where k.state = 'waiting' order by k.due_at nulls first, k.started_at limit most)
        union all
        (select 3, b.* from (
            select k.*, bridge.effects_without_outcome(k.effects) as open_effects from known k where k.effects <> '{}') b
         where b.open_effects <> '{}' order by b.started_at limit most)
        union all
        (select 4, k.*, null from known k where k.state = 'failed'
         order by coalesce(k.ended_at, k.started_at) desc limit most)
        union all
        (select 5, k.*, null from known k where k.state = 'finished' order by k.finished_at desc limit most)
    )
    select case p.part when 3 then 'effects' else p.state end, p.event_id, p.attempts, p.started_at, p.finished_at, p.due_at,
        p.ended_at, p.pid, p.failure ->> 'code', left(p.failure ->> 'reason', 500), p.open_effects
    from parts p
    order by p.part, case when p.part = 2 then p.due_at end nulls first,
        case when p.part <= 3 then p.started_at end,
        coalesce(p.finished_at, p.ended_at, p.started_at) desc
$$;
comment on function bridge.worker_events(text, int, int) is
    'What a worker has in hand, what waits, what it gave up, and what it finished, of so many events that were begun last.';

-- Keys that a worker holds, from after a line on, with the event that holds each and how many wait behind it (100 at most).
-- It steps from key to key, of all workers, and over `look_at` of them at most; `next_after` is where to go on, null at the
-- end. There is always a row; its `key` is null where nothing was found.
create function bridge.keys_held(worker_name text, after_line bigint, look_at int, most int)
returns table (next_after bigint, line bigint, key text, event_id uuid, since timestamptz, behind bigint)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    with recursive lines as (
        (select h.line, h.worker, 1 as number from bridge.held h where h.line > after_line order by h.line, h.worker limit 1)
        union all
        select following.line, following.worker, l.number + 1 from lines l cross join lateral (
            select h.line, h.worker from bridge.held h where (h.line, h.worker) > (l.line, l.worker)
            order by h.line, h.worker limit 1) as following
        where l.number < look_at
    ), ours as materialized (
        select l.line from lines l where l.worker = worker_name order by l.number limit most
    ), ending as (
        select case when (select count(*) from ours) = most then (select max(o.line) from ours o)
                    when (select count(*) from lines) = look_at then (select max(l.line) from lines l) end as next_after
    )
    select e.next_after, o.line, first.key, first.event_id, first.since,
        (select count(*) - 1 from (select from bridge.held b where b.line = o.line and b.worker = worker_name limit 101) n)
    from ending e left join ours o on true
    left join lateral (
        select h.key, h.event_id, h.since from bridge.held h where h.line = o.line and h.worker = worker_name
        order by h.place limit 1) first on true
    order by o.line
$$;
comment on function bridge.keys_held(text, bigint, int, int) is
    'Keys that dead letters of a worker hold, with the event that holds each, a page at a time.';

-- Webhooks. ------------------------------------------------------------------------------------------------

-- The endpoints after one, with what waits for each; counts go no further than `count_to` (null: to the end).
create function bridge.list_endpoints(after bigint default 0, most int default null, count_to int default null)
returns table (
    id bigint, url text, topics text[], description text, concurrency int, rate double precision, created_at timestamptz,
    disabled_at timestamptz, disabled_why text, breaker text, failures int, open_until timestamptz,
    paused_until timestamptz, failing_since timestamptz, last_success_at timestamptz,
    due bigint, sending bigint, failed bigint, skipped bigint)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp
-- The index alone has all that is counted.
set enable_seqscan = off set enable_bitmapscan = off as $$
    select e.id, e.url, e.topics, e.description, e.concurrency, e.rate, e.created_at, e.disabled_at, e.disabled_why,
        case when e.open_until is null then 'closed' when e.open_until > clock_timestamp() then 'open' else 'half open' end,
        e.failures, e.open_until, e.paused_until, e.failing_since, e.last_success_at,
        (select count(*) from (
            select from bridge.webhook_delivery d where d.state = 'due' and d.endpoint = e.id limit count_to) n),
        (select count(*) from (
            select from bridge.webhook_delivery d where d.state = 'sending' and d.endpoint = e.id limit count_to) n),
        (select count(*) from (
            select from bridge.webhook_delivery d where d.state = 'failed' and d.endpoint = e.id limit count_to) n),
        (select count(*) from (
            select from bridge.webhook_delivery d where d.state = 'skipped' and d.endpoint = e.id limit count_to) n)
    from (select w.* from bridge.webhook_endpoint w where w.id > after order by w.id limit most) e
    order by e.id
$$;
comment on function bridge.list_endpoints(bigint, int, int) is
    'The endpoints after one, with what waits for each and how each is: so many, and counted so far, at most.';

-- What recover_endpoint() would make due, of each kind `count_to` at most (null: all).
create function bridge.count_recoverable(
    endpoint bigint, since timestamptz, count_to int default null, out failed bigint, out skipped bigint)
language plpgsql stable security definer set search_path = pg_catalog, bridge, pg_temp
set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    if not exists (select from bridge.webhook_endpoint e where e.id = count_recoverable.endpoint) then
        perform bridge.no_such_endpoint(endpoint);
    end if;
    select count(*) into failed from (
        select from bridge.webhook_delivery d where d.state = 'failed' and d.endpoint = count_recoverable.endpoint
            and d.finished_at >= since limit count_to) n;
    select count(*) into skipped from (
        select from bridge.webhook_delivery d where d.state = 'skipped' and d.endpoint = count_recoverable.endpoint
            and d.finished_at >= since limit count_to) n;
end $$;
comment on function bridge.count_recoverable(bigint, timestamptz, int) is
    'How many deliveries recover_endpoint() would make due: that failed for good, and that were skipped.';

-- migrations/0031_pause_audit.sql ------------------------------------------------------------

-- oldest program: 0024
-- Who paused what, and who let it go on: a pause that has ended left nothing behind.

create table bridge.pause_audit (
  id     bigint generated always as identity primary key,
  kind   text not null check (kind in ('sink', 'worker')),
  bridge text not null,
  name   text not null,
  action text not null check (action in ('paused', 'resumed')),
  person text not null,
  role   text not null default session_user,
  why    text not null default '',
  at     timestamptz not null default clock_timestamp()
);
comment on table bridge.pause_audit is 'Each pause of a sink or a worker, and its end, with who did it.';

-- False where it was paused before; that pause stays as it is.
create or replace function bridge.set_pause(pause_kind text, bridge_name text, pause_name text, person text, reason text)
  returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  insert into bridge.pause (kind, bridge, name, who, why)
  values (pause_kind, bridge_name, pause_name, person, reason) on conflict do nothing;
  if not found then
    return false;
  end if;
  insert into bridge.pause_audit (kind, bridge, name, action, person, why)
  values (pause_kind, bridge_name, pause_name, 'paused', person, reason);
  -- A bridge that leads looks at once; one that does not hear it looks with its next sign of life.
  perform pg_notify('bridge_pause', bridge_name);
  return true;
end
$$;

create function bridge.end_pause(pause_kind text, bridge_name text, pause_name text, person text)
  returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  delete from bridge.pause p where p.kind = pause_kind and p.bridge = bridge_name and p.name = pause_name;
  if not found then
    return false;
  end if;
  insert into bridge.pause_audit (kind, bridge, name, action, person)
  values (pause_kind, bridge_name, pause_name, 'resumed', end_pause.person);
  perform pg_notify('bridge_pause', bridge_name);
  return true;
end
$$;
comment on function bridge.end_pause(text, text, text, text) is
  'Lets a paused sink or worker go on; the person is written down. False: it was not paused.';

-- Programs before this migration ask so, and do not say who they are.
create or replace function bridge.end_pause(pause_kind text, bridge_name text, pause_name text)
  returns boolean
  language sql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select bridge.end_pause(pause_kind, bridge_name, pause_name, session_user::text)
$$;

-- roles.sql ------------------------------------------------------------

-- Least privilege: one group role per process. Run after every migration; running it again changes nothing.
-- Login roles are yours to create: `create role web login in role bridge_emitter`, `grant bridge_relay to relay`.
-- Whoever writes to a table whose trigger calls bridge.emit() must be in bridge_emitter, unless the
-- trigger's function is SECURITY DEFINER; tables under bridge.watch() ask nothing of their writers.

do $$
declare
  name text;
begin
  foreach name in array array['bridge_emitter', 'bridge_relay', 'bridge_worker', 'bridge_operator', 'bridge_viewer'] loop
    if not exists (select from pg_catalog.pg_roles where rolname = name) then
      begin
        execute format('create role %I nologin', name);
      exception when duplicate_object or unique_violation then
        null; -- Roles belong to the whole cluster: a migration of another database has just created it.
      end;
    end if;
  end loop;
end
$$;

revoke all on schema bridge from public;
revoke all on all tables in schema bridge from public;
revoke all on all sequences in schema bridge from public;
revoke all on all routines in schema bridge from public;
grant usage on schema bridge to bridge_emitter, bridge_relay, bridge_worker, bridge_operator, bridge_viewer;

-- bridge_emitter: those who record events. -----------------------------------------------------------------

grant execute on function
  bridge.emit(text, jsonb, text, jsonb),
  bridge.emit(text, json, text, jsonb),
  bridge.emit(text, text, text, jsonb),
  bridge.emit(text, jsonb, timestamptz, jsonb, text),
  bridge.emit(text, json, timestamptz, jsonb, text),
  bridge.emit(text, text, timestamptz, jsonb, text),
  bridge.cancel(uuid),
  bridge.notify(text, text),
  bridge.append_event(text, text, text, text, jsonb),
  bridge.schedule_event(text, text, text, text, jsonb, timestamptz),
  bridge.emitted()
to bridge_emitter;

-- bridge_relay: the daemon. --------------------------------------------------------------------------------

grant select on bridge.outbox, bridge.migration, bridge.event_schema, bridge.sample,
  bridge.pause_audit to bridge_relay;
grant select on sequence bridge.outbox_id_seq to bridge_relay; -- to see that it is not behind the log
grant select, insert, update on bridge.leader, bridge.bell to bridge_relay;
grant select, insert, update, delete on bridge.cursor to bridge_relay;
grant insert on bridge.dead_letter to bridge_relay;
-- To say ON CONFLICT (bridge, event_id, coalesce(sink, '')) one must be allowed to read these.
grant select (bridge, event_id, sink) on bridge.dead_letter to bridge_relay;
grant execute on function bridge.intake(text[], text[]), bridge.intake(uuid[], text[], text[]) to bridge_relay;

grant execute on function
  bridge.prune(timestamptz, int, bigint),
  bridge.status(),
  bridge.status(int),
  bridge.guards(),
  bridge.read_page(bigint, int8multirange, boolean, xid8[], int, bigint, text[], boolean),
  bridge.topic_regex(text[]),
  bridge.topic_test(text[]),
  bridge.takes(text, text[], text),
  bridge.split_page(bigint, int, text[], text, boolean),
  bridge.event_bytes(text, text, jsonb),
  bridge.calendar_time(timestamptz),
  bridge.header_texts(jsonb),
  bridge.any_header_texts(jsonb),
  bridge.floor_of(bigint, int8multirange, int8multirange),
  bridge.sequence_state(),
  bridge.lead_key(text),
  bridge.take_lead(text, text),
  bridge.begin_reading(text, jsonb),
  bridge.leave_lead(text),
  bridge.store_cursor(text, text, bigint, int8multirange, int8multirange, bigint[]),
  bridge.store_problem(text, text, text, double precision),
  bridge.take_horizon(),
  bridge.set_asleep(text, boolean),
  bridge.paused_sinks(text),
  bridge.worker_status(text[]),
  bridge.worker_status(text[], int),
  bridge.move_due(timestamptz, timestamptz, bigint, int, bigint),
  bridge.scheduled_status(),
  -- `pgbridge asyncapi`
  bridge.watches(regclass),
  bridge.watch_of(regclass),
  bridge.json_object(text),
  bridge.store_samples(text, text[], double precision, jsonb[], jsonb[], double precision)
to bridge_relay;

-- bridge_worker: the worker processes. ---------------------------------------------------------------------
-- A reply function is its author's to grant: `grant execute on function shop.invoice_rendered to bridge_worker`.

grant execute on function
  bridge.inbox_claim(text, uuid[], text[], bigint, bigint[], double precision[], boolean),
  bridge.inbox_claim_holding(text, uuid[], text[], text[], bigint, bigint[], double precision[], boolean),
  bridge.inbox_finish(text, uuid, bigint, int, jsonb),
  bridge.inbox_finish_unclaimed(text, uuid, jsonb),
  bridge.inbox_finish_together(text, uuid[], bigint[], int[], jsonb[]),
  bridge.inbox_end(text, uuid[], bigint[], int[], jsonb[], text, text),
  bridge.inbox_give_up(text, uuid[], bigint[], int[], int[], double precision[], jsonb[]),
  bridge.inbox_give_up_holding(text, uuid[], bigint[], int[], int[], double precision[], jsonb[], text[]),
  bridge.inbox_forget(text, uuid, text),
  bridge.inbox_effect_begin(text, uuid, bigint, int, text, jsonb),
  bridge.inbox_effect_again(text, uuid, bigint, int, text, text, jsonb),
  bridge.inbox_effect_end(text, uuid, bigint, int, text, jsonb),
  bridge.inbox_prune(text, timestamptz, int),
  bridge.held_keys(text),
  bridge.worker_pause(text),
  bridge.store_worker_sample(text, double precision, jsonb, jsonb, double precision),
  bridge.rate_take(text, int, double precision, double precision),
  -- `pgbridge-worker reconcile` and `listen`
  bridge.open_effects(text, timestamptz),
  bridge.settle_effect(text, uuid, text, jsonb, text),
  bridge.audit_dead_letter(text, text, uuid, text, text, text, text, text),
  bridge.receive_notice(text, text, text, text, text),
  bridge.prune_notices(text, timestamptz, int),
  -- `workers.webhooks` and `pgbridge-worker deliver`
  bridge.webhook_fan_out(uuid, jsonb),
  bridge.webhook_claim(int, bigint, double precision, bigint[]),
  bridge.webhook_next(),
  bridge.webhook_record(bigint[], int[], int[], double precision[], text[], text[], double precision[], double precision[]),
  bridge.webhook_backlog(),
  bridge.webhook_prune(timestamptz, int)
to bridge_worker;

-- bridge_operator: people. ---------------------------------------------------------------------------------

grant select on all tables in schema bridge to bridge_operator;
revoke all on bridge.webhook_secret from bridge_operator; -- shown once, to whoever adds an endpoint or rotates
grant select on sequence bridge.outbox_id_seq to bridge_operator;
grant insert on bridge.dead_letter to bridge_operator; -- what a replay finds refused
-- Dead letters leave only through functions that write down who took them away.
grant execute on function
  bridge.end_dead_letters(bigint[], text, text, text),
  bridge.refuse_dead_letter(bigint, text, text, int),
  bridge.audit_dead_letter(text, text, uuid, text, text, text, text, text),
  bridge.release_held(text, text, uuid, text),
  bridge.set_pause(text, text, text, text, text),
  bridge.end_pause(text, text, text),
  bridge.end_pause(text, text, text, text),
  bridge.paused_sinks(text),
  bridge.worker_pause(text),
  bridge.worker_status(text[]),
  bridge.worker_status(text[], int),
  bridge.worker_processes(text[], int),
  bridge.worker_events(text, int, int),
  bridge.keys_held(text, bigint, int, int),
  bridge.find_event(uuid, bigint, int),
  bridge.event_in_log(bigint),
  bridge.event_positions(bigint, text),
  bridge.event_inbox(uuid),
  bridge.search_events(bigint, bigint, int, int, bigint, text[], text, timestamptz, timestamptz, text, text, text),
  bridge.event_neighbours(bigint, text, int, int),
  bridge.event_content(bigint, int),
  bridge.set_worker_login(text, name),
  bridge.scheduled_status(),
  bridge.cancel(uuid),
  bridge.register_schema(text, json, text, text),
  bridge.unregister_schema(text),
  bridge.open_effects(text, timestamptz),
  bridge.settle_effect(text, uuid, text, jsonb, text),
  bridge.add_endpoint(text, text[], text, int, double precision, text),
  bridge.change_endpoint(bigint, text, text[], text, int, double precision),
  bridge.rotate_secret(bigint, interval, text),
  bridge.disable_endpoint(bigint, text),
  bridge.enable_endpoint(bigint),
  bridge.recover_endpoint(bigint, timestamptz),
  bridge.remove_endpoint(bigint),
  bridge.resend_delivery(bigint),
  bridge.endpoint_deliveries(bigint, int),
  bridge.list_endpoints(bigint, int, int),
  bridge.count_recoverable(bigint, timestamptz, int),
  bridge.position_at(timestamptz),
  bridge.set_position(text, text, bigint),
  bridge.forget_position(text, text),
  bridge.events_between(text, text, bigint, bigint, int),
  bridge.sequence_state(),
  bridge.status(),
  bridge.status(int),
  bridge.guards(),
  bridge.read_page(bigint, int8multirange, boolean, xid8[], int, bigint, text[], boolean),
  bridge.topic_regex(text[]),
  bridge.topic_test(text[]),
  bridge.takes(text, text[], text),
  bridge.split_page(bigint, int, text[], text, boolean),
  bridge.event_bytes(text, text, jsonb),
  bridge.calendar_time(timestamptz),
  bridge.header_texts(jsonb),
  bridge.any_header_texts(jsonb),
  bridge.take_horizon()
to bridge_operator;
-- Backfilling a table takes the right to read and lock its rows besides, since these functions read it as their caller.
grant execute on function
  bridge.begin_backfill(regclass, text, text, boolean),
  bridge.backfill_chunk(bigint, int, int),
  bridge.backfill_skipped(bigint, int),
  bridge.backfill_rows(bridge.backfill, regclass, text, boolean),
  bridge.require_backfill(bigint),
  bridge.backfill_lock(oid),
  bridge.open_backfill(text, text, oid, text[], text, text[], text[], bigint, text),
  bridge.record_read(bigint, text, text),
  bridge.advance_backfill(bigint, bigint, jsonb, jsonb, boolean),
  bridge.end_backfill(text, text, text),
  bridge.watch_of(regclass),
  bridge.primary_key(regclass),
  bridge.key_condition(text[], text[], text, text, jsonb),
  bridge.watched_key(text, text[]),
  bridge.watched_part(text, text[]),
  bridge.json_object(text),
  bridge.refuse_foreign_casts(regclass),
  bridge.sinks_behind(text)
to bridge_operator;
-- Watching a table takes its owner, and more trust than emitting: its rows are converted with the rights of the
-- owner of schema bridge. So it is not for bridge_emitter, which a web role may have.
grant execute on function
  bridge.watch(regclass, text, text, text[], text[]),
  bridge.unwatch(regclass),
  bridge.watches(regclass),
  bridge.write_capture(text, text, text[], text[]),
  bridge.drop_captures(),
  bridge.check_topic(text),
  bridge.capture()
to bridge_operator;

-- bridge_viewer: people who look, and change nothing. ------------------------------------------------------

grant select on all tables in schema bridge to bridge_viewer;
revoke all on bridge.webhook_secret from bridge_viewer;
grant select on sequence bridge.outbox_id_seq to bridge_viewer;
grant execute on function
  bridge.status(),
  bridge.status(int),
  bridge.guards(),
  bridge.scheduled_status(),
  bridge.paused_sinks(text),
  bridge.worker_pause(text),
  bridge.worker_status(text[]),
  bridge.worker_status(text[], int),
  bridge.worker_processes(text[], int),
  bridge.worker_events(text, int, int),
  bridge.keys_held(text, bigint, int, int),
  bridge.find_event(uuid, bigint, int),
  bridge.event_in_log(bigint),
  bridge.event_positions(bigint, text),
  bridge.event_inbox(uuid),
  bridge.search_events(bigint, bigint, int, int, bigint, text[], text, timestamptz, timestamptz, text, text, text),
  bridge.event_neighbours(bigint, text, int, int),
  bridge.event_content(bigint, int),
  bridge.open_effects(text, timestamptz),
  bridge.endpoint_deliveries(bigint, int),
  bridge.list_endpoints(bigint, int, int),
  bridge.count_recoverable(bigint, timestamptz, int),
  bridge.position_at(timestamptz),
  bridge.events_between(text, text, bigint, bigint, int),
  bridge.sequence_state(),
  bridge.topic_regex(text[]),
  bridge.topic_test(text[]),
  bridge.takes(text, text[], text),
  bridge.event_bytes(text, text, jsonb),
  bridge.calendar_time(timestamptz),
  bridge.header_texts(jsonb),
  bridge.any_header_texts(jsonb)
to bridge_viewer;
