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
