-- The log of events, how far each bridge has read it, and what could not be published.

create schema if not exists bridge;
comment on schema bridge is 'pgbridge: events of this database on their way to a message queue';

-- CACHE 1: a session that kept a stock of ids would hand out old ones long after newer ones were read.
create sequence bridge.outbox_id_seq as bigint cache 1;

-- A reader takes an id that it cannot see for lost once every transaction that was running has ended. That
-- holds only if the transaction had its xid before the id was taken: hence this order.
create function bridge.next_outbox_id() returns bigint
  language plpgsql volatile
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  perform pg_current_xact_id();
  return nextval('bridge.outbox_id_seq');
end
$$;
comment on function bridge.next_outbox_id() is
  'Guards rows that do not come through emit(): the transaction id is taken before the sequence''s value.';

create table bridge.outbox (
  id           bigint primary key default bridge.next_outbox_id(),
  event_id     uuid not null default gen_random_uuid(),
  topic        text not null,
  key          text,
  payload      text not null,
  content_type text not null,
  headers      jsonb not null default '{}',
  created_at   timestamptz not null default clock_timestamp()
) with (
  -- Append-only: vacuum by the number of rows, not by a share of a table that grows all week, so that the
  -- visibility map is fresh for the readers and the pruned space is soon used again.
  autovacuum_vacuum_insert_scale_factor = 0,
  autovacuum_vacuum_insert_threshold = 100000,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 50000,
  autovacuum_analyze_scale_factor = 0,
  autovacuum_analyze_threshold = 100000
);
alter sequence bridge.outbox_id_seq owned by bridge.outbox.id;
comment on table bridge.outbox is 'The log: one row an event, never updated, pruned after the retention.';

create table bridge.cursor (
  name              text primary key,
  mark              bigint not null default 0,
  gaps              int8multirange not null default '{}',
  horizon           xid8 not null,
  system_identifier bigint not null,
  leader            text,
  leader_since      timestamptz,
  stored_at         timestamptz not null default now()
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
comment on table bridge.cursor is
  'How far each bridge has read: the highest id settled, the ids below it not seen yet, and until when to look for them.';
comment on column bridge.cursor.system_identifier is
  'The cluster that horizon belongs to; transaction ids of another cluster mean nothing.';

create table bridge.bell (
  name   text primary key,
  asleep boolean not null default true
) with (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100);
comment on table bridge.bell is 'Which bridges sleep: only while one does, emit() sends a NOTIFY.';

-- How many bridges sleep, where every emit() looks: an expression that reads a sequence costs a fraction of a query.
create sequence bridge.sleepers as bigint minvalue 0;
comment on sequence bridge.sleepers is 'How many rows of bridge.bell say asleep; kept by its trigger.';

create function bridge.somebody_sleeps() returns boolean
  language sql volatile
  return coalesce(pg_sequence_last_value('bridge.sleepers'), 0) > 0;

-- A sequence takes part in no transaction: hence at the end of the one that changes the bell, when little can roll it
-- back. The new value is seen at once, so whoever takes a transaction id afterwards rings.
create function bridge.count_sleepers() returns trigger
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  -- One at a time, so that each sees what the one before has committed.
  perform pg_advisory_xact_lock(hashtextextended('pgbridge sleepers', 0));
  perform setval('bridge.sleepers', (select count(*) from bridge.bell where asleep));
  return null;
end
$$;

create constraint trigger count_sleepers after insert or update or delete on bridge.bell
  deferrable initially deferred for each row execute function bridge.count_sleepers();

create table bridge.dead_letter (
  id           bigint generated always as identity primary key,
  bridge       text not null,
  event_id     uuid not null,
  sequence     bigint not null,
  topic        text not null,
  key          text,
  payload      text not null,
  content_type text not null,
  headers      jsonb not null,
  created_at   timestamptz not null,
  sink         text,
  code         text not null,
  reason       text not null,
  attempts     int not null,
  failed_at    timestamptz not null default now()
);
-- A page that is read again after a crash may be dead-lettered again; one letter is enough.
create unique index dead_letter_once on bridge.dead_letter (bridge, event_id, coalesce(sink, ''));
comment on table bridge.dead_letter is 'Events that no retry can publish, with the reason; sink is null when no route took it.';

create table bridge.migration (
  version    int primary key,
  name       text not null,
  checksum   text not null,
  applied_at timestamptz not null default now()
);
comment on table bridge.migration is 'Which migrations of pgbridge this database has; checksum is the SHA-256 of the file.';
