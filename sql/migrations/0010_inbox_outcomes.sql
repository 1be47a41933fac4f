-- What the inbox knows of an event that is not finished: not before when it may run again, and with which failure it was
-- given up while its dead letter is still owed to the broker. A handler is never run again because a broker would not
-- take what became of it, and a delay is kept whatever the broker can do.

drop function bridge.inbox_claim(text, uuid[], bigint);
drop function bridge.inbox_release(text, uuid, bigint, integer, integer);

alter table bridge.inbox
    add column due_at   timestamptz,   -- it runs no earlier
    add column failure  jsonb,         -- it was given up with this failure, and its dead letter is owed
    add column ended_at timestamptz;   -- its dead letter was taken; an attempt after that, as of a replay, clears it

-- Claims events, and says of each how it stands. Waits for nobody but who claims the same event for the first time at the
-- same moment; give them in the order of their ids, so that no two callers wait for each other. `state` is
--   claimed   it is ours: run it; `attempt` says which run this is
--   finished  it was handled before: acknowledge it
--   failed    it was given up with `failure` after `attempt` runs: dead-letter it, and say so to inbox_forget()
--   busy      a living process has it: come back later
--   early     it may not run yet: come back after `seconds`
--   alone     its last attempt died with its process, and may have killed it: run it with nothing beside it, by claiming
--             it with `alone`
--   unheld    nobody holds the lock of the token that was given: take a new one first
-- A process never asks for an event that it has in hand, so a claim under its token, or under one of its `former` ones,
-- is one whose answer it did not get: nothing ran, and the attempt is the same. `backoff` are the seconds before the
-- attempts after the first, used where an attempt died; after the last, its last again.
create function bridge.inbox_claim(
    worker_name text, events uuid[], token bigint, former bigint[], backoff double precision[], alone boolean)
returns table (event uuid, state text, attempt integer, seconds double precision, failure jsonb)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    unheld constant boolean := pg_try_advisory_xact_lock_shared(token);
    own constant bigint[] := former || token;
    old bridge.inbox;
    died boolean;
begin
    -- A crash of the server that forgets these claims ends the session that holds their token as well; so nobody
    -- need wait for the disk before the handler runs. What finishes or begins an effect does wait.
    perform set_config('synchronous_commit', 'off', true);
    foreach event in array events loop
        attempt := null;
        seconds := null;
        failure := null;
        if unheld then
            state := 'unheld';
            return next;
            continue;
        end if;
        -- Looks first, since an insert would wait for whoever changes the row that is there.
        if not exists (select from bridge.inbox i where i.worker = worker_name and i.event_id = event) then
            insert into bridge.inbox (worker, event_id, claim) values (worker_name, event, token)
            on conflict do nothing;
            if found then
                state := 'claimed';
                attempt := 1;
                return next;
                continue;
            end if;
        end if;
        -- A row that is locked is being finished, perhaps behind a slow reply: that is nothing to wait for.
        select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
        for no key update skip locked;
        died := old.claim <> all (own) and pg_try_advisory_xact_lock_shared(old.claim);
        if not found then
            state := 'busy';
        elsif old.finished_at is not null then
            state := 'finished';
        elsif old.failure is not null then
            state := 'failed';
            attempt := old.attempts;
            failure := old.failure;
        elsif old.claim <> all (own) and not died then
            state := 'busy';
        elsif died and old.due_at is null then
            state := 'early';
            seconds := backoff[least(old.attempts, cardinality(backoff))];
            update bridge.inbox i set due_at = clock_timestamp() + make_interval(secs => seconds)
            where i.worker = worker_name and i.event_id = event;
        -- Clocks of brokers differ a little from ours.
        elsif old.due_at > clock_timestamp() + interval '0.5 seconds' then
            state := 'early';
            seconds := extract(epoch from old.due_at - clock_timestamp());
        elsif died and not alone then
            state := 'alone';
        else
            state := 'claimed';
            attempt := old.attempts + case when old.claim = any (own) then 0 else 1 end;
            update bridge.inbox i set claim = token, attempts = attempt, due_at = null, ended_at = null
            where i.worker = worker_name and i.event_id = event;
        end if;
        return next;
    end loop;
end $$;

-- Gives a claim up, so that any process may claim the event, after `delay` seconds. `counted` is the number of attempts
-- that stay on record: `attempt` after a failure, one less when the handler was not to blame. False when the claim is no
-- longer ours.
create function bridge.inbox_release(
    worker_name text, event uuid, token bigint, attempt integer, counted integer, delay double precision)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set claim = null, attempts = counted,
        due_at = case when delay > 0 then clock_timestamp() + make_interval(secs => delay) end
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- Gives an event up, with the failure that its dead letter will tell; it never runs again before inbox_forget(). False
-- when the claim is no longer ours.
create function bridge.inbox_fail(worker_name text, event uuid, token bigint, attempt integer, failure jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set claim = null, failure = inbox_fail.failure
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null;
    return found;
end $$;

-- The dead letter of an event was taken: a replay of it starts afresh. What was begun outside stays on record.
create function bridge.inbox_forget(worker_name text, event uuid) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set failure = null, attempts = 0, ended_at = clock_timestamp()
    where i.worker = worker_name and i.event_id = event and i.failure is not null;
end $$;

-- Two workers that get one event each have effects of their own, and so keys of their own.
create or replace function bridge.inbox_effect_begin(
    worker_name text, event uuid, token bigint, attempt integer, operation text)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = jsonb_build_object(operation, jsonb_build_object(
            'idempotency_key', worker_name || ':' || event::text || ':' || operation,
            'started_at', clock_timestamp())) || i.effects
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning i.effects -> operation into entry;
    return entry;
end $$;

-- Deletes at most `chunk` events of a worker that were finished, or whose dead letters were taken, before `before`, and
-- returns how many those were. What is still to be done stays: it is the evidence of what was begun.
create or replace function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000)
returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and coalesce(o.finished_at, o.ended_at) < before
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;
