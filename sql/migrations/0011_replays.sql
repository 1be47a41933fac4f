-- A repeat of an event that was given up is told from its replay. Each replay carries a mark of its own in the header
-- `replayed`; the inbox knows those that it has seen, and starts afresh only for a new one. Before, every later delivery
-- was taken for a replay, so that what a bridge had published twice was given up twice.

drop function bridge.inbox_claim(text, uuid[], bigint, bigint[], double precision[], boolean);
drop function bridge.inbox_forget(text, uuid);

alter table bridge.inbox add column replays text[] not null default '{}';  -- the marks of its replays, in their order

-- Claims events, and says of each how it stands. Waits for nobody but who claims the same event for the first time at the
-- same moment; give them in the order of their ids, so that no two callers wait for each other. `state` is
--   claimed   it is ours: run it; `attempt` says which run this is
--   finished  it was handled before, or given up and its dead letter taken: acknowledge it
--   failed    it was given up with `failure` after `attempt` runs: dead-letter it, and say so to inbox_forget()
--   busy      a living process has it: come back later
--   early     it may not run yet: come back after `seconds`
--   alone     its last attempt died with its process, and may have killed it: run it with nothing beside it, by claiming
--             it with `alone`
--   unheld    nobody holds the lock of the token that was given: take a new one first
-- A process never asks for an event that it has in hand, so a claim under its token, or under one of its `former` ones,
-- is one whose answer it did not get: nothing ran, and the attempt is the same. `backoff` are the seconds before the
-- attempts after the first, used where an attempt died; after the last, its last again. `replays` has for each event the
-- mark of the replay that brought it, or null: one that is new starts an event afresh that was given up, any other delivery
-- of such an event is a repeat.
create function bridge.inbox_claim(
    worker_name text, events uuid[], replays text[], token bigint, former bigint[], backoff double precision[],
    alone boolean)
returns table (event uuid, state text, attempt integer, seconds double precision, failure jsonb)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    unheld constant boolean := pg_try_advisory_xact_lock_shared(token);
    own constant bigint[] := former || token;
    old bridge.inbox;
    replay text;
    is_new_replay boolean;
    died boolean;
begin
    -- A crash of the server that forgets these claims ends the session that holds their token as well; so nobody
    -- need wait for the disk before the handler runs. What finishes or begins an effect does wait.
    perform set_config('synchronous_commit', 'off', true);
    for n in 1 .. cardinality(events) loop
        event := events[n];
        replay := replays[n];
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
            insert into bridge.inbox (worker, event_id, claim, replays)
            values (worker_name, event, token, array_remove(array[replay], null))
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
        is_new_replay := replay is not null and replay <> all (old.replays);
        if not found then
            state := 'busy';
        elsif old.finished_at is not null then
            state := 'finished';
        -- Its dead letter was taken, although we may not have heard of that: else nobody could have replayed it.
        elsif is_new_replay and (old.failure is not null or old.ended_at is not null) then
            state := 'claimed';
            attempt := 1;
            update bridge.inbox i set claim = token, attempts = 1, due_at = null, failure = null, ended_at = null,
                replays = old.replays || replay
            where i.worker = worker_name and i.event_id = event;
        elsif old.ended_at is not null then
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
            update bridge.inbox i set claim = token, attempts = attempt, due_at = null,
                replays = case when is_new_replay then old.replays || replay else old.replays end
            where i.worker = worker_name and i.event_id = event;
        end if;
        return next;
    end loop;
end $$;

-- The dead letter of an event that was given up was taken: from now on only a replay starts it afresh. What was begun
-- outside stays on record. `replay` is the mark of the delivery whose letter it was: a replay that came since may have
-- given the event up again, and that letter is still owed.
create function bridge.inbox_forget(worker_name text, event uuid, replay text) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    update bridge.inbox i set failure = null, ended_at = clock_timestamp()
    where i.worker = worker_name and i.event_id = event and i.failure is not null
      and i.replays[cardinality(i.replays)] is not distinct from replay;
end $$;
