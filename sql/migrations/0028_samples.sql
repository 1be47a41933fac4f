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
