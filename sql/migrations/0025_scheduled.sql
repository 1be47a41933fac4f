-- oldest program: 0024
-- Events that are not to be sent before a time: they wait beside the log, and the bridge that leads moves them into it. A
-- program that knows 0024 only moves none: under it they wait on, until a newer one leads.

create table bridge.scheduled (
  event_id     uuid primary key default gen_random_uuid(),
  id           bigint not null generated always as identity,
  at           timestamptz not null check (isfinite(at)),
  topic        text not null,
  key          text,
  payload      text not null,
  content_type text not null,
  headers      jsonb not null default '{}',
  created_at   timestamptz not null default clock_timestamp()
) with (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
  autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000
);
create index scheduled_due on bridge.scheduled (at, id);
comment on table bridge.scheduled is 'Events of emit(at => ...) that are not due yet: not in the log, and cancelled by cancel().';
comment on column bridge.scheduled.id is 'Events of one time go into the log in this order.';
comment on column bridge.scheduled.created_at is 'When it was scheduled. In the log it has the time of its move.';

-- As in the log, see 0021.
do $$
begin
  alter table bridge.scheduled alter column payload set compression lz4;
exception when feature_not_supported then
  alter table bridge.scheduled alter column payload set storage external;
end
$$;

create function bridge.schedule_event(
    topic text, payload text, content_type text, key text, headers jsonb, at timestamptz) returns uuid
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- Planner: estimates on a table that fills and empties are always stale.
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
declare
  present constant timestamptz := clock_timestamp();
  event uuid;
begin
  if not isfinite(at) or at > present + interval '10 years' then
    raise exception 'an event of topic % cannot wait until %; 10 years are allowed', quote_literal(topic), at
      using errcode = 'invalid_parameter_value',
            hint = 'Give a time within the next 10 years, such as now() + interval ''1 hour''. '
                   'What is past, and null, is recorded at once.';
  elsif at is null or at <= present then
    return bridge.append_event(topic, payload, content_type, key, headers);
  end if;
  if bridge.needs_care(topic, payload, key, headers) then
    headers := bridge.headers_with_care(topic, payload, key, headers);
  end if;
  -- NOTIFY takes a lock of the whole cluster, so whoever leads is woken only for what is due before all that it can know
  -- of. The past is not looked at: while an old snapshot lives, the index has all that was moved. A transaction that is still
  -- open when an earlier event is due may be found late, by the bridge's next poll.
  if not exists (select from bridge.scheduled s where s.at > present and s.at <= schedule_event.at)
     and coalesce(current_setting('bridge.doorbell', true), '') <> 'off' then
    perform pg_notify('bridge_scheduled', '');
  end if;
  insert into bridge.scheduled as s (at, topic, key, payload, content_type, headers)
    values (at, topic, key, payload, content_type, headers) returning s.event_id into event;
  return event;
end
$$;
comment on function bridge.schedule_event(text, text, text, text, jsonb, timestamptz) is
  'What emit(at => ...) comes down to. The event is checked, and takes its context, now.';

-- Functions of their own, since whoever calls those without a time shall pay nothing for this, and since functions of users
-- may depend on those. The time stands third and the headers before the key, so that no call that was valid becomes
-- ambiguous: in emit('t', '{}'::jsonb, 'key', '{}') PostgreSQL takes a bare literal for a text wherever it can.
create function bridge.emit(topic text, payload jsonb, at timestamptz, headers jsonb default '{}', key text default null)
  returns uuid
  language sql volatile
  return bridge.schedule_event(topic, payload::text, 'application/json', key, headers, at);
comment on function bridge.emit(text, jsonb, timestamptz, jsonb, text) is
  'Records an event that is not sent before the time `at`, and returns its id, by which cancel() takes it back.';

create function bridge.emit(topic text, payload json, at timestamptz, headers jsonb default '{}', key text default null)
  returns uuid
  language sql volatile
  return bridge.schedule_event(topic, payload::text, 'application/json', key, headers, at);
comment on function bridge.emit(text, json, timestamptz, jsonb, text) is
  'Records an event that is not sent before the time `at`. The JSON text travels exactly as it is.';

create function bridge.emit(topic text, payload text, at timestamptz, headers jsonb default '{}', key text default null)
  returns uuid
  language sql volatile
  return bridge.schedule_event(topic, payload, 'text/plain', key, headers, at);
comment on function bridge.emit(text, text, timestamptz, jsonb, text) is
  'Records an event with a text/plain payload that is not sent before the time `at`.';

create function bridge.cancel(event_id uuid) returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  delete from bridge.scheduled s where s.event_id = cancel.event_id;
  return found;
end
$$;
comment on function bridge.cancel(uuid) is
  'Takes an event back that waits for its time. False where it does not: it is in the log by now, or never was scheduled.';

-- Moves events that are due into the log, in the order of their times: at most `most`, of `most_bytes` of payload or one,
-- of those due at `until` (null: now) and behind (after_at, after_id).
--
-- A row that somebody is cancelling is not waited for, and left where it is; so is what lies behind it in its key. How many
-- that were is `blocked`, and the next call begins before them and asks for so many more, or stops. `next_in`: seconds until
-- the first event after `until` is due; null without one.
create function bridge.move_due(
    until timestamptz, after_at timestamptz, after_id bigint, most int, most_bytes bigint,
    out moved bigint, out blocked bigint, out moved_until text, out last_at text, out last_id bigint,
    out next_in double precision)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  -- Planner: estimates on a table that fills and empties are always stale.
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
begin
  moved := 0;
  blocked := 0;
  until := least(until, clock_timestamp());
  moved_until := until::text;
  if exists (select from bridge.scheduled s where s.at <= until and (s.at, s.id) > (after_at, after_id))
     -- Bridges of several names may lead on one log: one would take what another moves for what is being cancelled.
     and pg_try_advisory_xact_lock(hashtextextended('pgbridge scheduled', 0)) then
    -- The leader's session does not wait for the disk. Here a crash must not bring back what was published.
    perform set_config('synchronous_commit', 'local', true);
    -- The transaction id before the sequence's values: see next_outbox_id().
    perform pg_current_xact_id();
    with due as materialized (
      select s.event_id, s.at, s.id, s.key, octet_length(s.payload) as bytes
      from bridge.scheduled s
      where s.at <= until and (s.at, s.id) > (after_at, after_id)
      order by s.at, s.id limit most
    ), free as materialized (
      select s.event_id from bridge.scheduled s
      where s.event_id = any (array(select d.event_id from due d)) for update skip locked
    ), taken as materialized (
      select d.key, d.at, d.id from due d where d.event_id not in (select f.event_id from free f)
    ), ready as materialized (
      select d.event_id, sum(d.bytes) over (order by d.at, d.id rows unbounded preceding) - d.bytes as bytes_before
      from due d join free f on f.event_id = d.event_id
      where not exists (select from taken t where t.key = d.key and (t.at, t.id) < (d.at, d.id))
    ), gone as (
      delete from bridge.scheduled s using ready r
      where s.event_id = r.event_id and r.bytes_before < most_bytes
      returning s.event_id, s.at, s.id, s.topic, s.key, s.payload, s.content_type, s.headers
    ), stored as (
      insert into bridge.outbox (id, event_id, topic, key, payload, content_type, headers)
      select nextval('bridge.outbox_id_seq'), g.event_id, g.topic, g.key, g.payload, g.content_type, g.headers
      from (select * from gone order by at, id) g
    )
    select (select count(*) from gone), (select count(*) from due) - (select count(*) from ready), l.at::text, l.id
    into moved, blocked, last_at, last_id
    from (select 1) one left join (select g.at, g.id from gone g order by g.at desc, g.id desc limit 1) l on true;
    if moved > 0 and bridge.somebody_sleeps() then
      perform bridge.ring();
    end if;
  end if;
  next_in := extract(epoch from (
    select s.at from bridge.scheduled s where s.at > until order by s.at, s.id limit 1) - clock_timestamp());
end
$$;
comment on function bridge.move_due(timestamptz, timestamptz, bigint, int, bigint) is
  'Moves a part of the scheduled events that are due into the log.';

create function bridge.scheduled_status(out waiting bigint, out is_exact boolean, out next_at timestamptz)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
as $$
  select n.waiting, n.waiting < 100000,
         (select bridge.calendar_time(s.at) from bridge.scheduled s order by s.at, s.id limit 1)
  from (select count(*) as waiting from (select from bridge.scheduled limit 100000) counted) n
$$;
comment on function bridge.scheduled_status() is
  'How many events wait for their time (of 100,000 at most), and when the next is due, which is past where nobody leads.';
