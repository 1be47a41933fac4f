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
