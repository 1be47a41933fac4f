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
