-- Outside effects good enough for money: how old a key is, by the clock that everybody shares; a fresh key once the other side
-- has refused for good; and the word of somebody who found out what became of an effect.

-- What is on record of an effect, with its age in seconds.
create function bridge.effect_entry(entry jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
    select entry || jsonb_build_object(
        'age', extract(epoch from clock_timestamp() - (entry ->> 'started_at')::timestamptz))
$$;

-- The record of an effect that begins again, now and under a fresh key; `refused` has what was before, oldest first.
create function bridge.effect_again(worker_name text, event uuid, operation text, entry jsonb, given jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
    select jsonb_build_object(
        'idempotency_key', pg_catalog.format('%s:%s:%s:%s', worker_name, event, operation,
            2 + jsonb_array_length(coalesce(entry -> 'refused', '[]'))),
        'started_at', clock_timestamp(),
        'refused', coalesce(entry -> 'refused', '[]') || jsonb_build_array(entry - 'refused'))
        || case when given is null then '{}' else jsonb_build_object('given', given) end
$$;

drop function bridge.inbox_effect_begin(text, uuid, bigint, integer, text);

-- Records that an outside effect is about to happen, before it happens. Returns what is on record of it:
-- {"idempotency_key", "started_at", "age" in seconds, "given" if anything was, "result" once it is known, "refused" once it
-- began again}; null when the claim is no longer ours. A second attempt gets the record of the first, so its key, its start
-- and what was given never change.
create function bridge.inbox_effect_begin(
    worker_name text, event uuid, token bigint, attempt integer, operation text, given jsonb default null)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = i.effects || jsonb_build_object(operation, jsonb_build_object(
            'idempotency_key', worker_name || ':' || event::text || ':' || operation,
            'started_at', clock_timestamp())
            || case when given is null then '{}' else jsonb_build_object('given', given) end
            || coalesce(i.effects -> operation, '{}'))
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null
    returning i.effects -> operation into entry;
    return bridge.effect_entry(entry);
end $$;

-- Begins an effect again whose result is a refusal for good, now with what is given. `key` is the one that was refused: asked
-- twice, as when the first answer was lost, it returns what the first call made. Else as inbox_effect_begin().
create function bridge.inbox_effect_again(
    worker_name text, event uuid, token bigint, attempt integer, operation text, key text, given jsonb default null)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    entry jsonb;
begin
    update bridge.inbox i set effects = case
        when i.effects -> operation ->> 'idempotency_key' = key and i.effects -> operation ? 'result'
        then jsonb_set(i.effects, array[operation], bridge.effect_again(
            worker_name, event, operation, i.effects -> operation, given))
        else i.effects end
    where i.worker = worker_name and i.event_id = event and i.claim = token and i.attempts = attempt
      and i.finished_at is null and i.effects ? operation
    returning i.effects -> operation into entry;
    return bridge.effect_entry(entry);
end $$;

-- Puts on record what became of an effect that was begun and has no result: `outcome`, a JSON object that its handler finds
-- as the result; or null where it never happened, and then it may begin again under a fresh key. `key` is the effect's.
-- False where no such effect waits for an outcome, or its event is being handled.
create function bridge.settle_effect(worker_name text, event uuid, key text, outcome jsonb) returns boolean
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
    where e.value ->> 'idempotency_key' = settle_effect.key and not e.value ? 'result';
    if not found then
        return false;
    end if;
    update bridge.inbox i set effects = case
        when outcome is null
        then jsonb_set(i.effects, array[operation], bridge.effect_again(worker_name, event, operation, entry, null))
        else jsonb_set(i.effects, array[operation, 'result'], outcome) end
    where i.worker = worker_name and i.event_id = event;
    return true;
end $$;

comment on function bridge.settle_effect(text, uuid, text, jsonb) is
    'Puts on record what became of an outside effect whose outcome is unknown, before its event is replayed.';
