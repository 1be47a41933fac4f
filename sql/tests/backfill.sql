-- Backfills: what they refuse, what they send, and with whose rights. Beside concurrent changes: tests/integration/test_backfill.py.
select plan(41);
create function pg_temp.attempt(who name, statement text) returns text language plpgsql as $$
begin
  execute format('set local role %I', who);
  execute statement;
  reset role;
  return 'done';
exception when others then
  return sqlstate || ' ' || sqlerrm;
end $$;
create function pg_temp.begin(t regclass, topic text default null, anew boolean default false) returns bigint language sql as
  $$ select run from bridge.begin_backfill(t, topic, 'me@here', anew) $$;
create function pg_temp.events() returns table (topic text, key text, payload jsonb, headers jsonb) language sql as
  $$ select topic, key, payload::jsonb, headers from bridge.emitted() where headers ? 'backfill' order by id $$;

-- What watch() was told.
create table stock (id int primary key, v int, note text);
select throws_ok($$ select bridge.watch_of('stock') $$, '55000', 'public.stock is not watched', 'a table that is not watched');
insert into stock select n, n, 'x' from generate_series(1, 5) n;
select bridge.watch('stock');
select results_eq($$ select topic, operations, keys, columns from bridge.watch_of('stock') $$,
  $$ values ('public.stock.read', '{delete,insert,update}'::text[], '{id}'::text[], null::text[]) $$, 'the topic of a row that is read');
select bridge.watch('stock', topic => 'it''s', key => 'v', columns => '{v,note}', operations => '{update,insert}');
select results_eq($$ select topic, operations, keys, columns from bridge.watch_of('stock') $$,
  $$ values ('it''s', '{insert,update}'::text[], '{v}'::text[], '{v,note}'::text[]) $$, 'all as watch() was told');
select results_eq($$ select unseen, unkeyed from bridge.begin_backfill('stock', null, 'me', false) $$, $$ values ('{delete}'::text[], true) $$,
  'what passes unseen is said');
select is(bridge.end_backfill('public', 'stock', 'cancelled'), true, 'it is cancelled');
select is(bridge.end_backfill('public', 'stock', 'cancelled'), false, 'once');
alter table stock disable trigger bridge_watch_insert;
select results_eq($$ select operations from bridge.watch_of('stock') $$, $$ values ('{update}'::text[]) $$, 'a disabled trigger does not watch');
select bridge.unwatch('stock');
create trigger old after insert on stock referencing new table as new_rows for each statement execute function bridge.capture('was.old', '{id}', '');
select throws_ok($$ select bridge.watch_of('stock') $$, '55000', 'public.stock was watched by an older version, which did not write down how',
  'a trigger of an older version');
select bridge.watch('stock');

-- Refusals.
select throws_ok($$ select pg_temp.begin('stock', '') $$, '22023', 'the topic of an event is empty', 'an empty topic');
create table keyless (v int);
select bridge.watch('keyless', key => 'v');
select throws_ok($$ select pg_temp.begin('keyless') $$, '42P16', 'public.keyless has no primary key, by which a backfill goes through its rows', 'no primary key');
select throws_ok($$ select bridge.backfill_chunk(0, 1, 1) $$, '55000', null, 'an unknown one');

-- Rows.
create temp table first as select pg_temp.begin('stock') as run;
select is((select run from first), pg_temp.begin('stock'), 'one that has not ended goes on');
select throws_ok($$ select pg_temp.begin('stock', 'other') $$, '55000', 'the backfill of public.stock that has not ended has the topic ''public.stock.read''', 'under its topic');
select results_eq($$ select taken, skipped, walked, finished from first, bridge.backfill_chunk(run, 2, 10) $$,
  $$ values (2::bigint, 0::bigint, false, false) $$, 'a chunk');
select results_eq('select topic, key, payload from pg_temp.events()', $$ values
  ('public.stock.read', '1', '{"operation": "read", "schema": "public", "table": "stock", "new": {"id": 1, "v": 1, "note": "x"}, "old": null}'::jsonb),
  ('public.stock.read', '2', '{"operation": "read", "schema": "public", "table": "stock", "new": {"id": 2, "v": 2, "note": "x"}, "old": null}') $$,
  'its events');
select is((select jsonb_agg(distinct headers) from pg_temp.events()), (select jsonb_build_array(jsonb_build_object('backfill', run)) from first),
  'which say whose they are');
select is((select last_key from bridge.backfill, first where id = run), '["2"]', 'where it is');
delete from stock where id = 3;
insert into stock values (0, 0, 'behind'), (9, 9, 'ahead');
select results_eq($$ select taken, walked, finished from first, bridge.backfill_chunk(run, 3, 10) $$, $$ values (3::bigint, false, false) $$, 'the next ones');
select results_eq($$ select taken, walked, finished from first, bridge.backfill_chunk(run, 3, 10) $$, $$ values (0::bigint, true, true) $$, 'and the end');
select results_eq('select key from pg_temp.events()', $$ values ('1'), ('2'), ('4'), ('5'), ('9') $$, 'what was there, and what came ahead');
select is((select outcome from bridge.backfill, first where id = run), 'finished', 'it has ended');
select throws_ok($$ select bridge.record_read(run, '1', '{}') from first $$, '55000', null, 'and takes no more rows');
select throws_ok($$ select bridge.advance_backfill(run, 1, null, '[]', true) from first $$, '55000', null, 'nor steps');
select isnt((select run from first), pg_temp.begin('stock'), 'the next one is another');

-- What has changed since it began.
select bridge.watch('stock');
select throws_ok($$ select pg_temp.begin('stock') $$, '55000', 'since the backfill of public.stock began, the table was watched again', 'watched again');
select throws_ok($$ select bridge.backfill_chunk(max(id), 1, 1) from bridge.backfill $$, '55000', 'since the backfill of public.stock began, the table was watched again',
  'also in the middle');
select lives_ok($$ select pg_temp.begin('stock', null, true) $$, 'it may begin anew');
select is((select array_agg(outcome order by id) from bridge.backfill where table_name = 'stock'), '{cancelled,finished,restarted,null}', 'which ends the one before');
alter table stock rename column note to remark;
select lives_ok($$ select bridge.backfill_chunk(max(id), 1, 1) from bridge.backfill $$, 'a column may have another name, where all are watched');
alter table stock rename to stocks;
select throws_ok($$ select bridge.backfill_chunk(max(id), 1, 1) from bridge.backfill $$, '55000', 'the table public.stock was dropped or renamed', 'the table may not');

-- Columns and keys.
create table part (id int primary key, secret text, v int);
insert into part values (1, 's', 7);
select bridge.watch('part', key => 'v', columns => '{v}');
select bridge.backfill_chunk(pg_temp.begin('part'), 10, 10);
select results_eq($$ select key, payload -> 'new' from pg_temp.events() where topic = 'public.part.read' $$, $$ values ('7', '{"v": 7}'::jsonb) $$,
  'watched columns only, under the watched key');
alter table part rename column v to w;
select bridge.end_backfill('public', 'part', 'cancelled');
select throws_ok($$ select bridge.backfill_chunk(pg_temp.begin('part'), 1, 1) $$, '42703', 'bridge.watch() was told of the column v, which public.part no longer has',
  'a column that is gone');
create table long_keys (id text primary key);
insert into long_keys values (repeat('x', 1025));
select bridge.watch('long_keys');
select throws_ok($$ select bridge.backfill_chunk(pg_temp.begin('long_keys'), 1, 1) $$, '22023', 'the key of an event of the watched table public.long_keys has 1025 bytes; 1024 are allowed',
  'a key that is too long');

-- Whose rights.
create role pgbridge_test_reader in role bridge_operator;
select alike(pg_temp.attempt('pgbridge_test_reader', $$ select bridge.begin_backfill('stocks', null, 'me', false) $$), '42501 the role pgbridge_test_reader may not read%',
  'no right to read');
grant select on stocks to pgbridge_test_reader;
select alike(pg_temp.attempt('pgbridge_test_reader', $$ select bridge.begin_backfill('stocks', null, 'me', false) $$), '42501 the role pgbridge_test_reader may not read%',
  'no right to lock');
grant update (v) on stocks to pgbridge_test_reader;
select is(pg_temp.attempt('pgbridge_test_reader', $$ select bridge.backfill_chunk(run, 1, 1) from bridge.begin_backfill('stocks', null, 'me', false) $$), 'done', 'both');
alter table stocks enable row level security;
select alike(pg_temp.attempt('pgbridge_test_reader', $$ select bridge.backfill_chunk(max(id), 1, 1) from bridge.backfill where table_name = 'stocks' $$), '42501%row-level security%',
  'rows that a policy hides are not left out in silence');
select alike(pg_temp.attempt('pgbridge_test_reader', $$ select bridge.begin_backfill('stocks', null, 'me', false) $$), '42501 row security hides rows%', 'nor begun');
-- Another's table must not run that one's code with the rights of who backfills it.
create role pgbridge_test_owner in role bridge_operator;
create schema evil authorization pgbridge_test_owner;
select is(pg_temp.attempt('pgbridge_test_owner', $$
  create type evil.e as enum ('a');
  create function evil.cast_e(evil.e) returns json language plpgsql as 'begin raise exception ''ran as %'', current_user; end';
  create table evil.t (id int primary key, e evil.e default 'a');
  insert into evil.t values (1);
  select bridge.watch('evil.t');
  create cast (evil.e as json) with function evil.cast_e(evil.e) $$), 'done', 'a table with a cast of its owner''s');
select throws_like($$ select bridge.backfill_chunk(pg_temp.begin('evil.t'), 1, 1) $$, 'a cast to json made by a role%', 'is not converted by others');
select is(pg_temp.attempt('pgbridge_test_reader', $$ insert into bridge.backfill (schema_name) values ('x') $$), '42501 permission denied for table backfill', 'nobody writes progress by hand');
select * from finish();
