-- The workers' ledger: which events a worker has in hand or has finished.
--
-- A worker process holds a session advisory lock on a random token. A claim is alive as long as somebody
-- holds the lock of its token, so a crashed process frees its events the moment PostgreSQL ends its session,
-- and no lease has to run out. `attempts` counts the runs of the handler and, together with the token, fences:
-- whoever lost a claim can no longer finish it.

create table bridge.inbox (
    worker      text        not null,
    event_id    uuid        not null,
    claim       bigint,                                -- token of the process that has it; null: nobody has
    attempts    integer     not null default 1,
    effects     jsonb       not null default '{}',     -- outside effects by operation, see inbox_effect_begin()
    result      jsonb,
    started_at  timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    primary key (worker, event_id)
)
-- Room in the page lets a finish be a HOT update: no index holds what it changes.
with (fillfactor = 80);

create index inbox_started on bridge.inbox (worker, started_at);

-- The functions below keep their plans. One made while the table is nearly empty would scan it, and go on to do so
-- while it grows: hence enable_seqscan = off.

comment on table bridge.inbox is
    'Events that workers have claimed or finished; makes the database effects of a worker exactly-once.';

-- Claims events, and says of each how it stands. A process never asks for one that it has in hand, so a claim under
-- its own token is one whose answer it did not get. Give them in the order of their ids: then no two callers wait for
-- each other. `state` is
--   claimed   it is ours: run it; `attempt` says which run this is
--   finished  it was handled before: acknowledge it
--   busy      a living process has it: come back later
--   unheld    nobody holds the lock of the token that was given: take a new one first
create function bridge.inbox_claim(worker_name text, events uuid[], token bigint)
returns table (event uuid, state text, attempt integer)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    unheld boolean := pg_try_advisory_xact_lock_shared(token);
    finished timestamptz;
begin
    -- A crash of the server that forgets these claims ends the session that holds their token as well; so nobody
    -- need wait for the disk before the handler runs. What finishes or begins an effect does wait.
    perform set_config('synchronous_commit', 'off', true);
    foreach event in array events loop
        attempt := null;
        if unheld then
            state := 'unheld';
            return next;
            continue;
        end if;
        insert into bridge.inbox as i (worker, event_id, claim) values (worker_name, event, token)
        on conflict (worker, event_id) do update set claim = excluded.claim, attempts = i.attempts + 1
            where i.finished_at is null
              and (i.claim is null or i.claim = excluded.claim or pg_try_advisory_xact_lock_shared(i.claim))
        returning i.attempts into attempt;
        if found then
            state := 'claimed';
        else
            select i.finished_at into finished from bridge.inbox i where i.worker = worker_name and i.event_id = event;
            state := case when finished is null then 'busy' else 'finished' end;
        end if;
        return next;
    end loop;
end $$;

-- Finishes a claimed event; false when the claim is no longer ours. Call it in the transaction of the reply.
create function bridge.inbox_finish(worker_name text, event uuid, token bigint, attempt integer, outcome jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set finished_at = clock_timestamp(), result = outcome, claim = null
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- Finishes claimed events of a worker without a reply; the arrays go together, in the order of the ids. Returns those
-- whose claims were still ours.
create function bridge.inbox_finish_all(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[])
returns setof uuid
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
begin
    for n in 1 .. cardinality(events) loop
        if bridge.inbox_finish(worker_name, events[n], tokens[n], attempts[n], outcomes[n]) then
            return next events[n];
        end if;
    end loop;
end $$;

-- Gives a claim up, so that any process may claim the event at once. `counted` is the number of attempts that
-- stay on record: `attempt` after a failure, one less when the handler was not to blame, 0 with a dead letter, so
-- that its replay starts afresh. False when the claim is no longer ours.
create function bridge.inbox_release(worker_name text, event uuid, token bigint, attempt integer, counted integer)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set claim = null, attempts = counted
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- Records that an outside effect is about to happen, before it happens. Returns what is on record of it:
-- {"idempotency_key", "started_at", "result" once it is known}; null when the claim is no longer ours.
-- A second attempt gets the record of the first, so its key and its start never change.
create function bridge.inbox_effect_begin(worker_name text, event uuid, token bigint, attempt integer, operation text)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = jsonb_build_object(operation, jsonb_build_object(
            'idempotency_key', event::text || ':' || operation, 'started_at', clock_timestamp())) || i.effects
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning i.effects -> operation into entry;
    return entry;
end $$;

-- Records what an outside effect gave; false when the claim is no longer ours.
create function bridge.inbox_effect_end(
    worker_name text, event uuid, token bigint, attempt integer, operation text, outcome jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set effects = jsonb_set(i.effects, array[operation, 'result'], outcome)
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null and i.effects ? operation;
    return found;
end $$;

-- Deletes at most `chunk` finished events of a worker that ended before `before`, and returns how many those were.
-- Unfinished ones stay: they are the evidence of what was begun.
create function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000) returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and o.finished_at < before
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;
