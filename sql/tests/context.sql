-- Where traceparent and actor come from.
select plan(26);

create function pg_temp.headers() returns jsonb language plpgsql as $$
declare
  emitted uuid := bridge.emit('t', '{}'::jsonb);
begin
  return (select headers from bridge.outbox where event_id = emitted);
end $$;
create function pg_temp.set(name text, value text) returns void language sql as 'select set_config(name, value, true)';

select is(pg_temp.headers(), '{}', 'no settings, no headers');

select pg_temp.set('request.headers', '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "host": "x"}');
select pg_temp.set('request.jwt.claims', '{"sub": "user-7", "role": "web", "exp": 1}');
select is(pg_temp.headers(),
  '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "actor": "{\"sub\": \"user-7\", \"role\": \"web\"}"}',
  'PostgREST''s request gives traceparent and actor');
select lives_ok($$ select bridge.emit('t', '{}'::jsonb, headers => '{"actor": {"sub": "cron"}}') $$, 'an actor among the headers');
select is((select headers ->> 'actor' from bridge.emitted() order by id desc limit 1), '{"sub": "cron"}', 'wins over the request''s');

select pg_temp.set('bridge.traceparent', '00-11111111111111111111111111111111-2222222222222222-00');
select pg_temp.set('bridge.actor', '{"sub": "batch"}');
select is(pg_temp.headers(),
  '{"traceparent": "00-11111111111111111111111111111111-2222222222222222-00", "actor": "{\"sub\": \"batch\"}"}',
  'our own settings win over the request''s');

select pg_temp.set('bridge.traceparent', 'nonsense');
select throws_ok('select bridge.emit(''t'', ''x'')', '22023', 'the setting bridge.traceparent is no W3C traceparent: nonsense', 'a wrong bridge.traceparent is told');
select pg_temp.set('bridge.traceparent', '00-00000000000000000000000000000000-2222222222222222-00');
select throws_ok('select bridge.emit(''t'', ''x'')', '22023', null, 'and so are zeros');
select pg_temp.set('bridge.traceparent', '');
select pg_temp.set('bridge.actor', 'batch');
select throws_ok('select bridge.emit(''t'', ''x'')', '22023', 'the setting bridge.actor is no JSON object with sub or role', 'a wrong bridge.actor is told');
select pg_temp.set('bridge.actor', '{"name": "batch"}');
select throws_ok('select bridge.emit(''t'', ''x'')', '22023', null, 'and so is one that names nobody');
select pg_temp.set('bridge.actor', '');

select pg_temp.set('request.headers', '{"traceparent": "evil\r\nheader"}');
select pg_temp.set('request.jwt.claims', '{"role": "web"}');
select is(pg_temp.headers(), '{"actor": "{\"role\": \"web\"}"}', 'a client''s wrong traceparent is left out');
select pg_temp.set('request.headers', 'not json');
select pg_temp.set('request.jwt.claims', '"text"');
select is(pg_temp.headers(), '{}', 'a broken request breaks no transaction');
select pg_temp.set('request.headers', '{"traceparent": {"a": "\u0000"}}');
select is(pg_temp.headers(), '{}', 'nor does one that jsonb cannot hold');
select pg_temp.set('request.headers', '[1]');
select pg_temp.set('request.jwt.claims', '{"sub": null, "exp": 1}');
select is(pg_temp.headers(), '{}', 'claims without subject and role name no actor');

select pg_temp.set('request.headers', '');
select pg_temp.set('request.jwt.claims', '{"role": "web"}');
select lives_ok('create table pg_temp.watched (id int primary key)', 'a table');
select lives_ok($$ select bridge.watch('pg_temp.watched'); insert into pg_temp.watched values (1) $$, 'that is watched');
select is((select headers from bridge.emitted() order by id desc limit 1), '{"actor": "{\"role\": \"web\"}"}', 'takes its context as well');

-- Limits: what a request brings breaks nothing, what people set is raised.
select pg_temp.set('request.jwt.claims', json_build_object('sub', repeat('x', 1100), 'role', 'web')::text);
select is(pg_temp.headers(), '{}', 'claims too long for a broker name no actor');
select lives_ok('insert into pg_temp.watched values (2)', 'and break no statement on a watched table');
select pg_temp.set('request.jwt.claims', '{"sub": ' || repeat('[', 20000) || repeat(']', 20000) || '}');
select is(pg_temp.headers(), '{}', 'nor do claims that are nested beyond the server''s stack');
select pg_temp.set('request.jwt.claims', '{"sub": 1e5000}');
select is(pg_temp.headers(), '{}', 'nor does a number of 5,001 digits');
select pg_temp.set('request.headers', '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}');
select pg_temp.set('request.jwt.claims', '{"role": "web"}');
select lives_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object('h', repeat('x', 16383))) $$, 'headers up to the limit');
select is((select array_agg(k order by k) from bridge.emitted() e, jsonb_object_keys(e.headers) k where e.headers ? 'h'), '{h}',
  'leave no room for what the request brings');
select lives_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object('i', repeat('x', 16300))) $$, 'headers near the limit');
select is((select array_agg(k order by k) from bridge.emitted() e, jsonb_object_keys(e.headers) k where e.headers ? 'i'), '{i,traceparent}',
  'keep of it what fits');
select pg_temp.set('bridge.actor', '{"sub": "batch"}');
select throws_ok($$ select bridge.emit('t', 'x', headers => jsonb_build_object('h', repeat('x', 16383))) $$, '22023',
  'with bridge.actor and bridge.traceparent the headers of an event have 16405 bytes in names and values; 16384 are allowed',
  'an actor that people set is not left out');
select pg_temp.set('bridge.actor', json_build_object('sub', repeat('x', 1100))::text);
select throws_ok($$ select bridge.emit('t', 'x') $$, '22023', 'the actor in the setting bridge.actor has 1111 bytes; 1024 are allowed', 'nor is one that is too long');
select * from finish();
