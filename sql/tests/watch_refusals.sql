-- What bridge.watch() refuses, and what nobody may do through it.
select plan(20);
create table keyless (v int);
create table owned (id int primary key, v int);
create view a_view as select 1 as id;

select throws_ok($$ select bridge.watch(null) $$, '22004', null, 'no table');
select throws_ok($$ select bridge.watch('keyless') $$, '42P16', 'public.keyless has no primary key to order its events by', 'no primary key');
select lives_ok($$ select bridge.watch('keyless', key => 'v') $$, 'unless a column is named');
select throws_ok($$ select bridge.watch('a_view') $$, '42809', 'public.a_view is no table', 'a view');
select throws_ok($$ select bridge.watch('bridge.outbox') $$, '42809', null, 'the log itself');
select throws_ok($$ select bridge.watch('owned', topic => '') $$, '22023', 'the topic of an event is empty', 'empty topic');
select throws_ok($$ select bridge.watch('owned', key => 'V') $$, '42703', 'public.owned has no column "V"', 'unknown key');
select throws_ok($$ select bridge.watch('owned', columns => array['v', 'x"y']) $$, '42703', 'public.owned has no column "x""y"', 'unknown column');
select throws_ok($$ select bridge.watch('owned', columns => '{}') $$, '22023', null, 'no columns');
select throws_ok($$ select bridge.watch('owned', operations => '{}') $$, '22023', null, 'no operations');
select throws_ok($$ select bridge.watch('owned', operations => '{truncate}') $$, '22023', null, 'unknown operation');
select throws_ok($$ select bridge.watch('owned', operations => '{insert,null}') $$, '22023', null, 'null operation');

-- A role that may watch, yet owns nothing here.
create role pgbridge_test_watcher in role bridge_operator;
grant trigger, select on owned to pgbridge_test_watcher;
create function pg_temp.attempt(who name, statement text) returns text language plpgsql as $$
begin
  execute format('set local role %I', who);
  execute statement;
  reset role;
  return 'done';
exception when others then
  return sqlstate || ' ' || sqlerrm;
end $$;
select is(pg_temp.attempt('pgbridge_test_watcher', $$ select bridge.watch('owned') $$), '42501 only the owner of public.owned may watch it', 'another''s table is not watched');
select bridge.watch('owned');
select is(pg_temp.attempt('pgbridge_test_watcher', $$ select bridge.unwatch('owned') $$), '42501 must be owner of relation owned', 'nor unwatched');
create role pgbridge_test_web;
grant insert, update, delete, select on owned to pgbridge_test_web;
select is(pg_temp.attempt('pgbridge_test_web', $$ insert into owned values (1, 1) $$), 'done', 'writers of a watched table need no rights of ours');
select is((select count(*) from bridge.emitted() where topic = 'public.owned.inserted'), 1::bigint, 'and their rows are emitted');

-- A trigger made by hand, whose new_rows is a view of the attacker's that would run as the owner of capture().
create schema evil authorization pgbridge_test_watcher;
select is(pg_temp.attempt('pgbridge_test_watcher', $$
  create table evil.t (id int);
  create temp view new_rows as select current_user::text as id;
  create trigger sneak after insert on evil.t for each row execute function bridge.capture('x', '{id}', '');
  insert into evil.t values (1) $$), '39P01 bridge.capture() serves no trigger but those of bridge.watch()', 'capture() serves only triggers that watch() made');
select is(pg_temp.attempt('pgbridge_test_watcher', $$
  create table evil.t (id int);
  create temp view new_rows as select current_user::text as id;
  create trigger sneak after insert on evil.t for each statement execute function bridge.capture('x', '{id}', '');
  insert into evil.t values (1) $$), '39P01 bridge.capture() serves no trigger but those of bridge.watch()', 'statement-level ones included');
-- A type whose owner gave it a cast to json, which to_jsonb() would call as the owner of capture().
select alike(pg_temp.attempt('pgbridge_test_watcher', $$
  create type evil.e as enum ('a');
  create function evil.cast_e(evil.e) returns json language plpgsql as 'begin return to_json(current_user::text); end';
  create cast (evil.e as json) with function evil.cast_e(evil.e);
  create table evil.t (id int primary key, e evil.e);
  select bridge.watch('evil.t');
  insert into evil.t values (1, 'a') $$), '42501 a cast to json%', 'a type''s own cast does not run as the owner of the schema');
select is(pg_temp.attempt('pgbridge_test_watcher', $$
  create table evil."t'); drop table owned; --" ("i'd" int primary key, "v\" int);
  select bridge.watch('evil."t''); drop table owned; --"', topic => 'it''s \', columns => array['v\']);
  insert into evil."t'); drop table owned; --" values (1, 1) $$), 'done', 'names are quoted');
select * from finish();
