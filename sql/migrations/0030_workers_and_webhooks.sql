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
