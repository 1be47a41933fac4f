-- What the reader of the log relies on.
select plan(6);
select is((select seqcache from pg_sequence where seqrelid = 'bridge.outbox_id_seq'::regclass), 1::bigint, 'no session keeps a stock of ids');
select is((select count(*) from pg_index where indrelid = 'bridge.outbox'::regclass), 1::bigint, 'an event costs one index entry');
select ok(pg_get_functiondef('bridge.next_outbox_id()'::regprocedure) ~ 'pg_current_xact_id\(\);\s+return nextval',
  'the default takes the transaction id before the sequence''s value');
insert into bridge.outbox (topic, payload, content_type) values ('owner', 'x', 'text/plain');
select results_eq($$ select event_id is not null, headers, created_at >= now() from bridge.emitted() $$,
  $$ values (true, '{}'::jsonb, true) $$, 'a row that does not come through emit() is a whole event');
select ok(pg_get_functiondef('bridge.intake(text[],text[])'::regprocedure) ~ 'own_xid := pg_current_xact_id\(\);\s+insert'
  and pg_get_functiondef('bridge.intake(uuid[],text[],text[])'::regprocedure) ~ 'own_xid := pg_current_xact_id\(\);\s+insert'
  and pg_get_functiondef('bridge.capture()'::regprocedure) ~ 'own_xid := pg_current_xact_id\(\);.*insert into', 'bulk inserts as well');
select is((select case when attcompression = 'l' then 'lz4' when attstorage = 'e' then 'none' else 'pglz' end
           from pg_attribute where attrelid = 'bridge.outbox'::regclass and attname = 'payload'),
          (select case when 'lz4' = any(enumvals) then 'lz4' else 'none' end
           from pg_settings where name = 'default_toast_compression'),
  'no payload is compressed by pglz: lz4 does it, where the server has it');
select * from finish();
