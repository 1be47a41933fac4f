-- bridge.emit(at => ...) and cancel(): what waits, what goes straight to the log, what is refused, and what moves.
select plan(52);

create function pg_temp.move(until timestamptz default null, most int default 1000, most_bytes bigint default 1000000,
                             out moved bigint, out blocked bigint) language sql as
  $$ select m.moved, m.blocked from bridge.move_due(until, '-infinity', 0, most, most_bytes) m $$;

-- Straight to the log.
select isnt(bridge.emit('now', '{}'::jsonb, at => now(), key => 'k'), null, 'a time that has come');
select isnt(bridge.emit('now', '{ "a":1 }'::json, at => '0001-01-01 00:00+00', headers => '{"a": 1}'), null, 'one long past');
select isnt(bridge.emit('now', 'x'::text, at => null), null, 'and none at all');
select results_eq($$ select payload, content_type, key, headers from bridge.emitted() $$,
  $$ values ('{}', 'application/json', 'k', '{}'::jsonb), ('{ "a":1 }', 'application/json', null, '{"a": "1"}'), ('x', 'text/plain', null, '{}') $$,
  'are recorded at once');
select is_empty('select from bridge.scheduled', 'and nothing waits');

-- Calls without a time mean what they meant: a bare literal or null behind the payload is a key.
select lives_ok($$ select bridge.emit('key', '{}'::jsonb, 'k', '{}'), bridge.emit('key', '{}'::json, 'k', null), bridge.emit('key', 'x', 'k', '{"a": 1}'),
                          bridge.emit('key', 'x', 'k'), bridge.emit('key', 'x', null), bridge.emit('key', '{}'::jsonb, null, '{}'),
                          bridge.emit('key', 'x', headers => '{}', key => 'k'), bridge.emit('key', 'x', 'k'::varchar), bridge.emit('key', 'x', null, null) $$,
  'calls by position and by name');
prepare by_driver as select bridge.emit($1, $2, $3, $4);
select lives_ok($$ execute by_driver('key', 'x', 'k', '{}') $$, 'and a driver''s, which leaves the types to PostgreSQL');
select is((select count(*) from bridge.emitted() where topic = 'key'), 10::bigint, 'are all in the log');

-- Waiting.
create temp table waits as select bridge.emit('later', '{"b": 1, "a": [1.50]}'::jsonb, at => now() + interval '1 hour') as event;
select results_eq($$ select event_id, at - now(), topic, payload, content_type, key, headers, created_at >= now() from bridge.scheduled $$,
  $$ select event, interval '1 hour', 'later', '{"a": [1.50], "b": 1}', 'application/json', null::text, '{}'::jsonb, true from waits $$,
  'an event with a time waits under its id');
select is_empty($$ select from bridge.emitted() where topic = 'later' $$, 'and is not in the log');
select isnt(bridge.emit('later', '{ "b":1 }'::json, now() + interval '2 hours'), null, 'the time may stand third');
select isnt(bridge.emit('later', 'grüße'::text, at => now() + interval '3 hours', key => 'k', headers => '{"n": 1, "tenant": "acme"}'), null, 'json and text wait, too');
select results_eq($$ select payload, content_type, key, headers from bridge.scheduled where at > now() + interval '1 hour' order by at $$,
  $$ values ('{ "b":1 }', 'application/json', null, '{}'::jsonb), ('grüße', 'text/plain', 'k', '{"n": "1", "tenant": "acme"}') $$,
  'as they are written, with key and headers');
select lives_ok($$ select bridge.emit('later', 'x', at => now() + interval '10 years') $$, 'for ten years at most');

-- Refused, when it is emitted.
select throws_ok($$ select bridge.emit('t', 'x', at => now() + interval '10 years 1 minute') $$, '22023', null, 'not for longer');
select throws_ok(format($$ select bridge.emit('a''b', 'x', at => %L) $$, t), '22023',
  format('an event of topic ''a''''b'' cannot wait until %s; 10 years are allowed', t), 'not until ' || t) from unnest(array['infinity', '-infinity']) t;
select throws_ok($$ select bridge.emit(null, '{}'::jsonb, at => now() + interval '1 hour') $$, '22004', 'the topic of an event is null', 'no null topic');
select throws_ok($$ select bridge.emit('', '{}'::jsonb, at => now() + interval '1 hour') $$, '22023', 'the topic of an event is empty', 'no empty topic');
select throws_ok($$ select bridge.emit(repeat('x', 256), '{}'::json, at => now() + interval '1 hour') $$, '22023', 'the topic of an event has 256 bytes; 255 are allowed', 'no overlong topic');
select throws_ok($$ select bridge.emit('t', null::jsonb, at => now() + interval '1 hour') $$, '22004', 'the payload of an event of topic ''t'' is null', 'no null payload');
select throws_ok($$ select bridge.emit('t', 'x', at => now() + interval '1 hour', key => repeat('k', 1025)) $$, '22023', 'the key of an event of topic ''t'' has 1025 bytes; 1024 are allowed', 'no overlong key');
select throws_ok($$ select bridge.emit('t', 'x', at => now() + interval '1 hour', headers => '{"CC": "x"}') $$, '42939', 'the header name "CC" is reserved', 'no reserved header');
select throws_ok($$ select bridge.emit('t', 'x', at => now() + interval '1 hour', headers => '[1]') $$, '22023', 'the headers of an event are a JSON array, not an object', 'headers are an object');
select lives_ok($$ select bridge.emit('later', 'x', at => now() + interval '4 hours', headers => null) $$, 'no headers are none');

-- Cancelling.
select ok(bridge.cancel((select event from waits)), 'what waits can be cancelled');
select ok(not bridge.cancel((select event from waits)), 'once');
select ok(not bridge.cancel(event_id => gen_random_uuid()), 'what never was cannot');
select ok(not bridge.cancel((select event_id from bridge.emitted() limit 1)), 'nor what is in the log');
select ok(not bridge.cancel(null), 'nor nothing');
select is((select count(*) from bridge.scheduled), 4::bigint, 'the others wait on');
savepoint before;
select ok(bridge.cancel((select event_id from bridge.scheduled where key = 'k')), 'a cancellation');
rollback to before;
select is((select count(*) from bridge.scheduled), 4::bigint, 'is undone with its transaction');
select throws_ok(
  $$ do $do$ begin perform bridge.emit('gone', 'x', at => now() + interval '1 hour'); raise exception 'no' using errcode = 'P0009'; end $do$ $$,
  'P0009', 'no', 'a transaction that fails');
select is_empty($$ select from bridge.scheduled where topic = 'gone' $$, 'takes its events along');

-- Moving.
set local synchronous_commit = off;
select is((select (moved, blocked) from pg_temp.move()), (0::bigint, 0::bigint), 'nothing is due');
select is((select (moved, blocked) from pg_temp.move(now() + interval '1 year')), (0::bigint, 0::bigint), 'whatever time a caller has');
select ok((select next_in between 7190 and 7200 from bridge.move_due(null, '-infinity', 0, 1, 1)), 'the first is due in two hours');
select results_eq('select waiting, is_exact, next_at - now() from bridge.scheduled_status()', $$ values (4::bigint, true, interval '2 hours') $$, 'which the status says');
delete from bridge.scheduled;
select is((select next_in from bridge.move_due(null, '-infinity', 0, 1, 1)), null, 'without any, nothing is next');
select results_eq('select waiting, is_exact, next_at from bridge.scheduled_status()', $$ values (0::bigint, true, null::timestamptz) $$, 'and the status says so');

select set_config('bridge.actor', '{"sub": "user-7"}', true), set_config('bridge.traceparent', '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01', true);
create temp table due as select n, bridge.emit('due', n::text, at => now() + interval '1 hour', key => 'k' || n % 2, headers => '{"a": "b"}') as event from generate_series(1, 5) n;
select set_config('bridge.actor', '', true), set_config('bridge.traceparent', '', true);
-- The last three at one time, the first two before it and in the other order.
update bridge.scheduled set at = now() - case payload when '2' then interval '3 s' when '1' then interval '2 s' else interval '1 s' end;
create temp table first_part as select * from bridge.move_due(null, '-infinity', 0, 3, 1000000);
select is((select (moved, blocked) from first_part), (3::bigint, 0::bigint), 'as many as asked for');
select is((select m.moved from first_part f, bridge.move_due(f.moved_until::timestamptz, f.last_at::timestamptz, f.last_id, 3, 1000000) m), 2::bigint, 'the rest behind them');
select results_eq($$ select e.payload, e.event_id, e.key, e.content_type, e.headers from bridge.emitted() e where e.topic = 'due' order by e.id $$,
  $$ select d.n::text, d.event, 'k' || d.n % 2, 'text/plain', '{"a": "b", "actor": "{\"sub\": \"user-7\"}", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}'::jsonb
     from due d order by array_position('{2,1,3,4,5}', d.n) $$,
  'by their times, and by insertion, with the ids, headers and context that they were emitted with');
select ok((select bool_and(e.created_at >= now()) from bridge.emitted() e where e.topic = 'due'), 'and the time of their move');
select is_empty('select from bridge.scheduled', 'none waits any more');

select bridge.emit('large', repeat('x', 1000), at => now() + interval '1 hour') from generate_series(1, 3);
update bridge.scheduled set at = now();
select is((select moved from pg_temp.move(most_bytes => 1)), 1::bigint, 'one at least, however large');
select is((select moved from pg_temp.move(most_bytes => 1500)), 2::bigint, 'and otherwise by bytes');
select is(current_setting('synchronous_commit'), 'local', 'a move waits for the disk, although the leader''s session does not');
select throws_ok($$ insert into bridge.scheduled (at, topic, payload, content_type) values ('infinity', 't', 'x', 'text/plain') $$, '23514', null, 'no row waits for ever');
select ok((select attcompression = 'l' or attstorage = 'e' from pg_attribute where attrelid = 'bridge.scheduled'::regclass and attname = 'payload'), 'no payload is compressed by pglz');
select ok(pg_get_functiondef('bridge.move_due(timestamptz,timestamptz,bigint,int,bigint)'::regprocedure) ~ 'pg_current_xact_id\(\);\s+with due', 'the transaction id is taken before the sequence''s values');
select * from finish();
