-- bridge.notify(), which stands where pg_notify() stood, and bridge.intake(), which stores what was heard.
select plan(7);

select lives_ok($$ select bridge.notify('My Channel', 'hello') $$, 'any channel name is a topic');
select lives_ok($$ select bridge.notify('My Channel', null) $$, 'a null payload is empty, as with pg_notify()');
select lives_ok($$ select bridge.notify('large', repeat('x', 8001)) $$, 'more than 7999 bytes are taken');
select results_eq(
  $$ select topic, key, payload, content_type from bridge.emitted() limit 2 $$,
  $$ values ('My Channel', 'My Channel', 'hello', 'text/plain'), ('My Channel', 'My Channel', '', 'text/plain') $$,
  'the channel is topic and key');
select throws_ok($$ select bridge.notify('', 'x') $$, '22023', null, 'no empty channel');

select is(bridge.intake(array['b', 'a', 'b'], array['1', '2', '3']), 3::bigint, 'intake() counts what it stores');
select results_eq(
  $$ select topic, key, payload, content_type from bridge.emitted() where topic in ('a', 'b') $$,
  $$ values ('b', 'b', '1', 'text/plain'), ('a', 'a', '2', 'text/plain'), ('b', 'b', '3', 'text/plain') $$,
  'one event for each notification, in the order in which they came');
select * from finish();
