-- bridge.notify(), which stands where pg_notify() stood, and bridge.intake(), which stores what was heard.
select plan(13);

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

select is(bridge.intake(array['00000000-0000-0000-0000-00000000000b', '00000000-0000-0000-0000-00000000000a']::uuid[], array['c', 'c'], array['1', '2']),
  2::bigint, 'with the ids that they were given when they were heard');
select is(bridge.intake(array['00000000-0000-0000-0000-00000000000b', '00000000-0000-0000-0000-00000000000a']::uuid[], array['c', 'c'], array['1', '2']),
  2::bigint, 'a call that is repeated');
select results_eq($$ select payload, array_agg(distinct event_id), count(*) from bridge.emitted() where topic = 'c' group by payload order by payload $$,
  $$ values ('1', array['00000000-0000-0000-0000-00000000000b'::uuid], 2::bigint), ('2', array['00000000-0000-0000-0000-00000000000a'::uuid], 2::bigint) $$,
  'makes the same events again');
select throws_ok($$ select bridge.intake(array[gen_random_uuid()], array['a', 'b'], array['1', '2']) $$, '22023', 'intake() got 1 ids, 2 channels and 2 payloads',
  'an id for each');
select throws_ok($$ select bridge.intake(array[null::uuid], array['a'], array['1']) $$, '23502', null, 'and none that is null');
select throws_ok($$ select bridge.notify(repeat('x', 256), 'x') $$, '22023', null, 'no channel longer than a topic');
select * from finish();
