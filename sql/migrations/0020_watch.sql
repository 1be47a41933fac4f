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
