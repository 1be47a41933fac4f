-- bridge.emit(): what is stored, and what is refused.
select plan(24);

select isnt(bridge.emit('shop.order.placed', '{"b": 1, "a": [1.50]}'::jsonb), null, 'emit() returns the event''s id');
select results_eq(
  $$ select topic, payload, content_type, key, headers from bridge.emitted() $$,
  $$ values ('shop.order.placed', '{"a": [1.50], "b": 1}', 'application/json', null::text, '{}'::jsonb) $$,
  'jsonb is stored as its text');

select isnt(bridge.emit('t.json', '{ "b":1,  "a": "\u00e9" }'::json, key => 'k', headers => '{"tenant": "acme", "n": 1}'), null, 'json is taken');
select results_eq(
  $$ select payload, content_type, key, headers from bridge.outbox where topic = 't.json' $$,
  $$ values ('{ "b":1,  "a": "\u00e9" }', 'application/json', 'k', '{"n": "1", "tenant": "acme"}'::jsonb) $$,
  'json is stored exactly as it is written, with key and headers');

select isnt(bridge.emit('t.text', 'grüße'::text), null, 'text is taken');
select isnt(bridge.emit('t.text', '{"a": 1}'), null, 'a bare literal is text to PostgreSQL');
select results_eq(
  $$ select payload, content_type from bridge.outbox where topic = 't.text' order by id $$,
  $$ values ('grüße', 'text/plain'), ('{"a": 1}', 'text/plain') $$,
  'text payloads are text/plain');
select isnt(bridge.emit('t.null', 'null'::jsonb, headers => null), null, 'the JSON null is a payload, and no headers are none');
select isnt(bridge.emit(repeat('x', 255), ''), null, 'a topic of 255 bytes and an empty payload are taken');
select isnt(bridge.emit('t.big', to_jsonb(repeat('x', 300000))), null, 'a payload may be far larger than a NOTIFY');

select throws_ok($$ select bridge.emit(null, '{}'::jsonb) $$, '22004', 'the topic of an event is null', 'no null topic');
select throws_ok($$ select bridge.emit('', '{}'::jsonb) $$, '22023', 'the topic of an event is empty', 'no empty topic');
select throws_ok($$ select bridge.emit(repeat('x', 256), '{}'::jsonb) $$, '22023', 'the topic of an event has 256 bytes; 255 are allowed', 'no overlong topic');
select throws_ok($$ select bridge.emit(repeat('é', 128), '{}'::jsonb) $$, '22023', 'the topic of an event has 256 bytes; 255 are allowed', 'bytes count, not characters');
select throws_ok($$ select bridge.emit('a''b', null::jsonb) $$, '22004', 'the payload of an event of topic ''a''''b'' is null', 'no null payload');
select throws_ok($$ select bridge.emit('t', '{}'::jsonb, headers => '[1]') $$, '22023', 'the headers of an event are a JSON array, not an object', 'headers are an object');
select throws_ok($$ select bridge.emit('t', '{}'::jsonb, headers => 'null') $$, '22023', 'the headers of an event are a JSON null, not an object', 'JSON null is no object');
select throws_ok($$ select bridge.emit('t', '{}'::jsonb, headers => '{"ce-id": "x"}') $$, '42939', 'the header name "ce-id" is reserved', 'ce- is reserved');
select throws_ok($$ select bridge.emit('t', '{}'::jsonb, headers => '{"CloudEvents_id": "x"}') $$, '42939', null, 'cloudEvents is reserved, whatever its case');
select throws_ok($$ select bridge.emit('t', '{}'::jsonb, headers => '{"": "x"}') $$, '22023', null, 'a header needs a name');
select throws_ok($$ select bridge.emit('t', '{}'::jsonb, headers => '{"a: b\r\nc": "x"}') $$, '22023', null, 'a header name cannot smuggle lines');

select throws_ok(
  $$ do $do$ begin perform bridge.emit('t.gone', '{}'::jsonb); raise exception 'no' using errcode = 'P0009'; end $do$ $$,
  'P0009', 'no', 'a transaction that fails');
select is_empty($$ select from bridge.outbox where topic = 't.gone' $$, 'takes its events along');

select ok(pg_get_functiondef('bridge.append_event(text,text,text,text,jsonb)'::regprocedure) ~ 'case when pg_catalog.pg_current_xact_id\(\) is not null then pg_catalog.nextval\(',
  'the transaction id is taken before the sequence''s value');
select * from finish();
