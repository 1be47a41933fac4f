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
