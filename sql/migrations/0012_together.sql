-- What ends at the same time shares a transaction, replies too, and work without an outside effect needs no claim before.

-- Without the worker before it. A plan that was made while the table was new took that index to look for an event, since
-- both cost the same then, and read all events of the worker each time: 1.5 ms an event beside 6,000 others.
drop index bridge.inbox_started;
create index inbox_started on bridge.inbox (started_at);

-- Finishes an event that was run without a claim, since running it twice does no harm. Says how that went:
--   finished  it is finished now
--   repeated  it was finished, or given up and its dead letter taken, before
--   busy      another run of it is on record, and goes on: come back later, with a claim
-- Call it in the transaction of the reply.
create function bridge.inbox_finish_unclaimed(worker_name text, event uuid, outcome jsonb) returns text
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
    return 'finished';
end $$;

-- Finishes events of a worker and calls the reply for each, in a savepoint of its own; the arrays go together, in the
-- order of the ids. A token that is null stands for no claim. `reply_schema` and `reply_name` are null where there is no
-- reply. `state` is
--   finished  it is done, and its reply was called
--   lost      the claim was no longer ours
--   repeated, busy   as inbox_finish_unclaimed() says
--   alone     its reply raised, and nothing of it was stored: try it alone, to hear the error
-- Runs with the rights and the settings of its caller, as a reply would that was called by itself.
create function bridge.inbox_end(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[],
    reply_schema text, reply_name text)
returns table (event uuid, state text)
language plpgsql as $$
declare
    call constant text := case when reply_name is not null then pg_catalog.format(
        'select pg_catalog.count(*) from (select %I.%I($1, $2)) as reply', reply_schema, reply_name) end;
begin
    for n in 1 .. pg_catalog.cardinality(events) loop
        event := events[n];
        begin
            state := case
                when tokens[n] is null then bridge.inbox_finish_unclaimed(worker_name, event, outcomes[n])
                when bridge.inbox_finish(worker_name, event, tokens[n], attempts[n], outcomes[n]) then 'finished'
                else 'lost'
            end;
            if call is not null and state = 'finished' then
                execute call using event, outcomes[n];
            end if;
        exception when others then
            state := 'alone';
        end;
        return next;
    end loop;
end $$;

drop function bridge.inbox_finish_all(text, uuid[], bigint[], integer[], jsonb[]);

-- Gives claims up: for `delays` seconds with `counted` attempts on record, or for good where there is a failure. The
-- arrays go together, in the order of the ids. Returns those whose claims were still ours.
create function bridge.inbox_give_up(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], counted integer[], delays double precision[],
    failures jsonb[])
returns setof uuid
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    was_ours boolean;
begin
    for n in 1 .. cardinality(events) loop
        was_ours := case
            when failures[n] is null
            then bridge.inbox_release(worker_name, events[n], tokens[n], attempts[n], counted[n], delays[n])
            else bridge.inbox_fail(worker_name, events[n], tokens[n], attempts[n], failures[n])
        end;
        if was_ours then
            return next events[n];
        end if;
    end loop;
end $$;
