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
