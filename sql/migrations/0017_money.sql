-- What money needs beside effects: what was begun outside and has no outcome can be listed and is never forgotten, who settled
-- it is on record, and what the other side reports by itself becomes an event once, however often it is told.

-- Effects of a worker that were begun, of events that came since then, and have no result, the oldest first. `key` is the
-- idempotency key, `age` in seconds. `state` is
--   running   a living process has the event
--   waiting   the event's next attempt is to come
--   dead      the event was given up
create function bridge.open_effects(worker_name text, since timestamptz)
returns table (event uuid, operation text, key text, begun_at timestamptz, age double precision, given jsonb, state text)
language sql volatile security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    select i.event_id, e.key, e.value ->> 'idempotency_key', (e.value ->> 'started_at')::timestamptz,
        extract(epoch from clock_timestamp() - (e.value ->> 'started_at')::timestamptz), e.value -> 'given',
        case when i.failure is not null or i.ended_at is not null then 'dead'
             when i.claim is null or pg_try_advisory_xact_lock_shared(i.claim) then 'waiting'
             else 'running' end
    from bridge.inbox i, jsonb_each(i.effects) e
    where i.worker = worker_name and i.started_at >= since and i.finished_at is null
      and e.value ? 'started_at' and not e.value ? 'result'
    order by 4
$$;
comment on function bridge.open_effects(text, timestamptz) is
    'Outside effects of a worker that were begun and have no outcome.';

alter table bridge.dead_letter_audit drop constraint dead_letter_audit_action_check;
alter table bridge.dead_letter_audit add constraint dead_letter_audit_action_check
    check (action in ('replayed', 'discarded', 'released', 'settled'));
comment on table bridge.dead_letter_audit is
    'Which dead letters were taken away, or hold their key no more (released), or for which effect it was said what became of '
    'it (settled: `why` has its key and the outcome), by whom and why. Without payloads, and never pruned.';

drop function bridge.settle_effect(text, uuid, text, jsonb);

-- Puts on record what became of an effect that was begun and has no result: `outcome`, a JSON object that its handler finds
-- as the result; or null where it never happened, and then it may begin again, at any time and under a fresh key. `key` is the effect's,
-- `person` whoever found out. False where no such effect waits for an outcome, or its event is being handled.
create function bridge.settle_effect(
    worker_name text, event uuid, key text, outcome jsonb, person text default session_user)
returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.inbox;
    operation text;
    entry jsonb;
begin
    if jsonb_typeof(outcome) <> 'object' then
        raise exception 'the outcome of an effect is a JSON object, or null, and not a JSON %', jsonb_typeof(outcome)
            using errcode = 'invalid_parameter_value';
    end if;
    select i.* into old from bridge.inbox i where i.worker = worker_name and i.event_id = event for no key update;
    if not found or old.finished_at is not null
       or not (old.claim is null or pg_try_advisory_xact_lock_shared(old.claim)) then
        return false;
    end if;
    select e.key, e.value into operation, entry from jsonb_each(old.effects) e
    where e.value ->> 'idempotency_key' = settle_effect.key and e.value ? 'started_at' and not e.value ? 'result';
    if not found then
        return false;
    end if;
    update bridge.inbox i set effects = case
        when outcome is null
        -- It has not begun, so it has no age: inbox_effect_begin() says when it does.
        then jsonb_set(i.effects, array[operation],
            bridge.effect_again(worker_name, event, operation, entry, null) - 'started_at')
        else jsonb_set(i.effects, array[operation, 'result'], outcome) end
    where i.worker = worker_name and i.event_id = event;
    insert into bridge.dead_letter_audit (letter, action, event_id, person, why)
    values (worker_name || ':' || event, 'settled', event, settle_effect.person,
            settle_effect.key || ': ' || coalesce(outcome::text, 'it never happened'));
    return true;
end $$;
comment on function bridge.settle_effect(text, uuid, text, jsonb, text) is
    'Puts on record what became of an outside effect whose outcome is unknown, before its event is replayed, and who said so.';

-- Deletes at most `chunk` events of a worker that were finished, or whose dead letters were taken, before `before`, and
-- returns how many those were. What is still to be done stays, and so does what was given up after it had begun something
-- outside: it is the evidence of that, without which a replay would begin it again.
create or replace function bridge.inbox_prune(worker_name text, before timestamptz, chunk integer default 1000)
returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
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

-- What other systems have reported to us, so that a report that comes again is none. -----------------------------------

create table bridge.notice (
    source      text        not null,   -- the worker that listens
    id          text        not null,   -- the other system's, of the report
    event_id    uuid,                   -- what it became
    received_at timestamptz not null default clock_timestamp(),
    primary key (source, id)
);
create index notice_received on bridge.notice (received_at);
comment on table bridge.notice is
    'Reports of other systems, as webhooks bring them, that have become events; a report that comes again is known by its id.';

-- Records a report as an event, once: its id, or null where the report was received before.
create function bridge.receive_notice(source text, id text, topic text, payload text, key text) returns uuid
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    emitted uuid;
begin
    insert into bridge.notice (source, id) values (receive_notice.source, receive_notice.id) on conflict do nothing;
    if not found then
        return null;
    end if;
    emitted := bridge.emit(topic, payload::json, key);
    update bridge.notice n set event_id = emitted where n.source = receive_notice.source and n.id = receive_notice.id;
    return emitted;
end $$;
comment on function bridge.receive_notice(text, text, text, text, text) is
    'Records what another system reports as an event, once for each id.';

-- Deletes at most `chunk` reports of a source that were received before then; returns how many.
create function bridge.prune_notices(source text, before timestamptz, chunk integer default 1000) returns integer
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    deleted integer;
begin
    delete from bridge.notice n using (
        select o.id from bridge.notice o
        where o.source = prune_notices.source and o.received_at < before
        order by o.received_at limit chunk for update skip locked) as old
    where n.source = prune_notices.source and n.id = old.id;
    get diagnostics deleted = row_count;
    return deleted;
end $$;
