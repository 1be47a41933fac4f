-- What an event may hold: keys, headers and their names; and how headers are handed to the bridge.
select plan(76);
create function pg_temp.last() returns jsonb language sql as 'select headers from bridge.emitted() order by id desc limit 1';

select lives_ok($$ select bridge.emit('t', 'x', repeat('é', 512)) $$, 'a key of 1,024 bytes');
select throws_ok($$ select bridge.emit('t', 'x', repeat('é', 512) || 'x') $$, '22023',
  'the key of an event of topic ''t'' has 1025 bytes; 1024 are allowed', 'no longer one');
select lives_ok($$ select bridge.emit('t', 'x', '') $$, 'an empty key is one');

select bridge.emit('t', 'x', headers => '{"s": "ä\"\\\n", "n": 1.50, "big": 1e30, "t": true, "f": false, "none": null, "empty": ""}');
select is(pg_temp.last(), '{"s": "ä\"\\\n", "n": "1.50", "big": "1000000000000000000000000000000", "t": "true", "f": "false", "empty": ""}',
  'values become texts, and null is left out');
select bridge.emit('t', 'x', headers => '{"none": null}');
select is(pg_temp.last(), '{}', 'also when nothing else is there');
select bridge.emit('t', 'x', headers => '{"actor": {"sub": "a", "n": 1}}');
select is(pg_temp.last(), '{"actor": "{\"n\": 1, \"sub\": \"a\"}"}', 'an actor may be an object');
select throws_ok($$ select bridge.emit('t', 'x', headers => '{"actor": {"sub": ["a"]}}') $$, '22023', 'the header actor is a JSON object', 'a flat one');
select throws_ok($$ select bridge.emit('t', 'x', headers => '{"actor": ["a"]}') $$, '22023', 'the header actor is a JSON array', 'and no array');
select throws_ok($$ select bridge.emit('t', 'x', headers => '{"a": {"b": 1}}') $$, '22023', 'the header a is a JSON object', 'no objects');
select throws_ok($$ select bridge.emit('t', 'x', headers => '{"a": []}') $$, '22023', 'the header a is a JSON array', 'no arrays');
select throws_ok($$ select bridge.emit('t', 'x', headers => ('{"a": ' || repeat('[', 1500) || repeat(']', 1500) || '}')::jsonb) $$,
  '22023', 'the header a is a JSON array', 'nor arrays in arrays');
select throws_ok($$ select bridge.emit('t', 'x', headers => '{"n": 1e100000}') $$, '22023',
  'the headers of an event have 100002 bytes in names and values; 16384 are allowed', 'no number without end');

select lives_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object('h', repeat('é', 8191) || 'x')) $$, '16,384 bytes of headers');
select lives_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object('h', repeat('"', 16383))) $$, 'are counted without the escapes of JSON');
select throws_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object('h', repeat('x', 16384))) $$, '22023',
  'the headers of an event have 16385 bytes in names and values; 16384 are allowed', 'and not one more');
select lives_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object(repeat('n', 128), 'x')) $$, 'a name of 128 bytes');
select throws_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object(repeat('n', 129), 'x')) $$, '22023', null, 'no longer one');
select throws_ok($$ select bridge.emit('t', 'x', headers => '{"é": "x"}') $$, '22023', 'the header name "é" is not legal', 'no letters beyond ASCII');
select throws_ok($$ select bridge.emit('t', 'x', headers => '{"é": null}') $$, '22023', null, 'whatever the value');

select throws_ok(format('select bridge.emit(''t'', ''x'', headers => jsonb_build_object(%L, ''x''))', name), '42939',
  format('the header name %I is reserved', name), name || ' is reserved')
from unnest('{CC,BCC,Status,Description,Nats-Msg-Id,nats-x,NATS-Expected-Stream,goog,googclient_traceparent,
  CloudPubSubDeadLetterSourceDeliveryCount,content-type,Content-Type,replayed,x-pgbridge-attempts,X-PGBRIDGE-code,pgbridge-x,x-death,
  x-first-death-queue,x-last-death-reason,x-delivery-count,x-acquired-count,x-opt-x,x-match,x-stream-offset,x-received-from,
  x-shovelled,ce-id,CE-id,cloudEvents_id,CLOUDEVENTS-id}'::text[]) as name;
select lives_ok(format('select bridge.emit(''t'', ''x'', headers => jsonb_build_object(%L, ''x''))', name), name || ' is not')
from unnest('{cc,status,description,traceparent,tracestate,actor,tenant,x-request-id,x-delay,Goog,center,accept,nat,replayed-by}'::text[]) as name;

-- As the bridge gets them. Rows of before, and those made by hand, may hold anything.
select is(bridge.header_texts('{}'), null, 'no headers');
select is(bridge.header_texts('{"a": "x", "b": ""}'), '{"a": "x", "b": ""}', 'texts as they are');
select is(bridge.header_texts('{"a": ["x"]}')::jsonb, '{"a": "[\"x\"]"}', 'the text of an array of texts');
select is(bridge.header_texts('{"a": [], "b": {"c": 1}, "d": true, "e": 1, "f": null}')::jsonb,
  '{"a": "[]", "b": "{\"c\": 1}", "d": "true", "e": "1"}', 'the text of other values');
select is(bridge.header_texts('{"a": null}'), null, 'null alone is none');
select is(bridge.header_texts(value), null, value::text || ' is none')
from unnest(array['[]', '["a"]', 'null', '1', '"a"', 'true']::jsonb[]) as value;
select is(length(bridge.header_texts('{"n": 1e5000}')), 5001 + length('{"n": ""}'), 'a number in all its digits');
select results_eq($$ select bridge.calendar_time(t) from unnest('{-infinity,infinity,4713-01-01 BC,2026-01-01 00:00+00}'::timestamptz[]) t $$,
  $$ select t::timestamptz from unnest('{0001-01-02 00:00+00,9999-12-30 00:00+00,0001-01-02 00:00+00,2026-01-01 00:00+00}'::timestamptz[]) t $$,
  'times are those of a calendar');
select * from finish();
