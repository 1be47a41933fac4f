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
