-- What ends without a reply needs no savepoints: there is nothing that could raise for one event and not for another. They
-- were a third of what PostgreSQL had to do for an event of a busy worker.

-- Finishes events of a worker without a reply, as inbox_end() does, all or none.
create function bridge.inbox_finish_together(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[])
returns table (event uuid, state text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    was_replayed boolean;
begin
    -- One after the other, and not in one statement: a plan for many, made while the inbox is new, could read all of it.
    for n in 1 .. cardinality(events) loop
        event := events[n];
        if tokens[n] is null then
            state := bridge.inbox_finish_unclaimed(worker_name, event, outcomes[n]);
        else
            update bridge.inbox i set finished_at = clock_timestamp(), result = outcomes[n], claim = null
            where i.worker = worker_name and i.event_id = event and i.claim = tokens[n] and i.attempts = inbox_finish_together.attempts[n]
              and i.finished_at is null
            returning cardinality(i.replays) > 0 into was_replayed;
            state := case when found then 'finished' else 'lost' end;
            if was_replayed then
                delete from bridge.held h where h.event_id = event and h.worker = worker_name;
            end if;
        end if;
        return next;
    end loop;
end $$;

-- Finishes events of a worker and calls the reply for each, in a savepoint of its own; the arrays go together, in the
-- order of the ids. A token that is null stands for no claim. `reply_schema` and `reply_name` are null where there is no
-- reply, and then an error is an error of all. `state` is
--   finished  it is done, and its reply was called
--   lost      the claim was no longer ours
--   repeated, busy   as inbox_finish_unclaimed() says
--   alone            its reply raised, and nothing of it was stored: try it alone, to hear the error
-- Runs with the rights and the settings of its caller, as a reply would that was called by itself.
create or replace function bridge.inbox_end(
    worker_name text, events uuid[], tokens bigint[], attempts integer[], outcomes jsonb[],
    reply_schema text, reply_name text)
returns table (event uuid, state text)
language plpgsql as $$
declare
    call text;
begin
    if reply_name is null then
        return query select f.event, f.state
            from bridge.inbox_finish_together(worker_name, events, tokens, attempts, outcomes) f;
        return;
    end if;
    call := pg_catalog.format(
        'select pg_catalog.count(*) from (select %I.%I($1, $2)) as reply', reply_schema, reply_name);
    for n in 1 .. pg_catalog.cardinality(events) loop
        event := events[n];
        begin
            state := case
                when tokens[n] is null then bridge.inbox_finish_unclaimed(worker_name, event, outcomes[n])
                when bridge.inbox_finish(worker_name, event, tokens[n], attempts[n], outcomes[n]) then 'finished'
                else 'lost'
            end;
            if state = 'finished' then
                execute call using event, outcomes[n];
            end if;
        exception when others then
            state := 'alone';
        end;
        return next;
    end loop;
end $$;
