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
