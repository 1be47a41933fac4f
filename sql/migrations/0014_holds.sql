-- Workers whose dead letters hold their key (`on_dead_letter = "hold"`): what comes behind a dead letter of its key is moved
-- aside to the dead letters too, and no handler runs for it, until the first has been replayed and handled.

-- A row for each event that is aside. A key is held while it has rows; only the event of the first may run, as a replay.
create table bridge.held (
    worker   text        not null,
    event_id uuid        not null,
    key      text        not null,
    line     bigint      not null generated always as (hashtextextended(key, 0)) stored, -- an index takes no long key
    place    bigint      not null generated always as identity,
    since    timestamptz not null default clock_timestamp(),
    primary key (event_id, worker)
);

-- Neither index begins with the worker, or a plan that is made while the table is new could take the wrong one, see
-- inbox_started in 0012_together.sql.
create index held_line on bridge.held (line, worker, place);

comment on table bridge.held is
    'Events that are dead letters of workers with on_dead_letter = "hold", and hold their key: it goes on once all of '
    'them are handled, in the order of their place.';

-- Claims events as inbox_claim() does, but none whose key is held by another one: that is given up with the code `held`, and
-- is aside from now on. It has had no attempt. `keys` has for each event its key, or null where it has none.
-- It never says that such an event is to wait: the replay for which it would wait may be behind it.
create function bridge.inbox_claim_holding(
    worker_name text, events uuid[], replays text[], keys text[], token bigint, former bigint[],
    backoff double precision[], alone boolean)
returns table (event uuid, state text, attempt integer, seconds double precision, failure jsonb)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    durability constant text := current_setting('synchronous_commit');
    own constant bigint[] := former || token;
    old bridge.inbox;
    replay text;
    first_of_key uuid;
    held jsonb;
    is_new_replay boolean;
    is_aside boolean;
    any_aside boolean := false;
begin
    if pg_try_advisory_xact_lock_shared(token) then
        -- It says of all of them that the token is not held.
        return query select c.* from bridge.inbox_claim(worker_name, events, replays, token, former, backoff, alone) c;
        return;
    end if;
    for n in 1 .. cardinality(events) loop
        event := events[n];
        replay := replays[n];
        select h.event_id into first_of_key from bridge.held h
        where h.line = hashtextextended(keys[n], 0) and h.worker = worker_name and h.key = keys[n]
        order by h.place limit 1;
        if first_of_key <> event then
            -- Whoever releases the key waits until this is stored, or is seen by the second look.
            perform pg_advisory_xact_lock_shared(hashtext(worker_name), hashtext(keys[n]));
            select h.event_id into first_of_key from bridge.held h
            where h.line = hashtextextended(keys[n], 0) and h.worker = worker_name and h.key = keys[n]
            order by h.place limit 1;
        end if;
        if first_of_key is null or first_of_key = event then
            return query select c.* from bridge.inbox_claim(
                worker_name, events[n:n], replays[n:n], token, former, backoff, alone) c;
            continue;
        end if;
        state := 'failed';
        attempt := 0;
        seconds := null;
        failure := null;
        held := jsonb_build_object(
            'code', 'held', 'reason', format('its key waits for the event %s: replay that one first', first_of_key),
            'trace', '');
        is_aside := false;
        if not exists (select from bridge.inbox i where i.worker = worker_name and i.event_id = event) then
            insert into bridge.inbox (worker, event_id, attempts, failure, replays)
            values (worker_name, event, attempt, held, array_remove(array[replay], null))
            on conflict do nothing;
            is_aside := found;
        end if;
        if not is_aside then
            select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
            for no key update skip locked;
            is_new_replay := replay is not null and replay <> all (old.replays);
            if not found then
                state := 'busy';
            elsif old.finished_at is not null or (old.ended_at is not null and not is_new_replay) then
                state := 'finished';
            elsif old.failure is not null and not is_new_replay then
                attempt := old.attempts;
                failure := old.failure;
            elsif old.claim <> all (own) and not pg_try_advisory_xact_lock_shared(old.claim) then
                state := 'busy';
            else
                is_aside := true;
                -- What has a claim of this process never ran: the answer to that was lost.
                attempt := case
                    when is_new_replay then 0
                    when old.claim = any (own) then old.attempts - 1
                    else old.attempts
                end;
                update bridge.inbox i set claim = null, attempts = attempt, due_at = null, ended_at = null,
                    failure = held,
                    replays = case when is_new_replay then old.replays || replay else old.replays end
                where i.worker = worker_name and i.event_id = event;
            end if;
        end if;
        if is_aside then
            any_aside := true;
            failure := held;
            insert into bridge.held (worker, event_id, key) values (worker_name, event, keys[n]) on conflict do nothing;
        end if;
        return next;
    end loop;
    if any_aside then
        -- Claims need not wait for the disk; this must be there before the broker has the letter.
        perform set_config('synchronous_commit', durability, true);
    end if;
end $$;

-- Gives claims up as inbox_give_up() does; those that end for good hold their keys from now on. One that held its key
-- before keeps its place.
create function bridge.inbox_give_up_holding(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], counted integer[], delays double precision[],
    failures jsonb[], keys text[])
returns setof uuid
language sql security definer set search_path = pg_catalog, bridge, pg_temp as $$
    with given_up as materialized (
        select g.event from bridge.inbox_give_up(worker_name, events, tokens, attempts, counted, delays, failures)
            as g (event)
    ), held as (
        insert into bridge.held (worker, event_id, key)
        select worker_name, event, u.key from unnest(events, failures, keys) as u (event, failure, key)
        join given_up using (event)
        where u.failure is not null and u.key is not null
        on conflict do nothing
    )
    select event from given_up
$$;

-- Finishes a claimed event; false when the claim is no longer ours. Call it in the transaction of the reply. It holds its
-- key no more: whatever held one runs as a replay.
create or replace function bridge.inbox_finish(
    worker_name text, event uuid, token bigint, attempt integer, outcome jsonb)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    was_replayed boolean;
begin
    update bridge.inbox i set finished_at = clock_timestamp(), result = outcome, claim = null
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning cardinality(i.replays) > 0 into was_replayed;
    if was_replayed then
        delete from bridge.held h where h.event_id = event and h.worker = worker_name;
    end if;
    return was_replayed is not null;
end $$;

-- Finishes an event that was run without a claim, since running it twice does no harm. Says how that went:
--   finished  it is finished now
--   repeated  it was finished, or given up and its dead letter taken, before
--   busy      another run of it is on record, and goes on: come back later, with a claim
-- Call it in the transaction of the reply. A worker that runs events so holds no keys, but may have held some before.
create or replace function bridge.inbox_finish_unclaimed(worker_name text, event uuid, outcome jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.inbox;
begin
    insert into bridge.inbox (worker, event_id, finished_at, result)
    values (worker_name, event, clock_timestamp(), outcome)
    on conflict do nothing;
    if found then
        return 'finished';
    end if;
    select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event
    for no key update skip locked;
    if old.finished_at is not null or old.ended_at is not null then
        return 'repeated';
    elsif not found or old.failure is not null or not (old.claim is null or pg_try_advisory_xact_lock_shared(old.claim))
    then
        return 'busy';
    end if;
    update bridge.inbox i set finished_at = clock_timestamp(), result = outcome, claim = null, due_at = null
    where i.worker = worker_name and i.event_id = event;
    if cardinality(old.replays) > 0 then
        delete from bridge.held h where h.event_id = event and h.worker = worker_name;
    end if;
    return 'finished';
end $$;

-- Deletes at most `chunk` events of a worker that were finished, or whose dead letters were taken, before `before`, and
-- returns how many those were. What is still to be done stays, as does what holds a key: it is the evidence of what was
-- begun.
create or replace function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000)
returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.inbox i using (
        select o.event_id from bridge.inbox o
        where o.worker = worker_name and o.started_at < before and coalesce(o.finished_at, o.ended_at) < before
          and not exists (select from bridge.held h where h.event_id = o.event_id and h.worker = worker_name)
        order by o.started_at limit chunk for update skip locked) as old
    where i.worker = worker_name and i.event_id = old.event_id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- How many keys of a worker are held. One may have a million events behind it: it steps from key to key.
create function bridge.held_keys(worker_name text) returns bigint
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    with recursive lines as (
        (select h.line, h.worker from bridge.held h order by h.line, h.worker limit 1)
        union all
        select following.line, following.worker from lines l cross join lateral (
            select h.line, h.worker from bridge.held h where (h.line, h.worker) > (l.line, l.worker)
            order by h.line, h.worker limit 1) as following
    )
    select count(*) from lines where worker = worker_name
$$;

-- What holds a key no longer does, or only one event of it: the key goes on without them, and what becomes of their dead
-- letters is its own matter. Returns how many events that were; `person` is who gave the command.
create function bridge.release_held(worker_name text, event_key text, event uuid, person text) returns bigint
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    released bigint;
begin
    -- What is being set aside at this moment is released, too, see inbox_claim_holding().
    perform pg_advisory_xact_lock(hashtext(worker_name), hashtext(event_key));
    with gone as (
        delete from bridge.held h
        where h.line = hashtextextended(event_key, 0) and h.worker = worker_name and h.key = event_key
          and (event is null or h.event_id = event)
        returning h.event_id, h.place
    )
    insert into bridge.dead_letter_audit (letter, action, event_id, person)
        select worker_name || ':' || g.event_id, 'released', g.event_id, release_held.person from gone g
        order by g.place;
    get diagnostics released = row_count;
    return released;
end $$;

alter table bridge.dead_letter_audit drop constraint dead_letter_audit_action_check;
alter table bridge.dead_letter_audit add constraint dead_letter_audit_action_check
    check (action in ('replayed', 'discarded', 'released'));

comment on table bridge.dead_letter_audit is
    'Which dead letters were taken away, or hold their key no more (released), by whom and why. Without payloads, and '
    'never pruned.';
comment on function bridge.held_keys(text) is
    'How many keys of a worker with on_dead_letter = "hold" are held.';
comment on function bridge.release_held(text, text, uuid, text) is
    'Lets a key of a worker go on without the events that hold it (null), or without one of them; returns how many.';
