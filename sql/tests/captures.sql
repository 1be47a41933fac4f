-- The functions that bridge.watch() writes: when they come and go, and what nobody may do through them.
select plan(37);
create function pg_temp.last(n int) returns table (topic text, key text, payload jsonb) language sql as
  'select topic, key, payload::jsonb from (select * from bridge.emitted() order by id desc limit n) l order by id';
create function pg_temp.captures() returns setof name language sql as
  $$ select proname from pg_proc where pronamespace = 'bridge'::regnamespace and proname like 'capture\_%' order by 1 $$;
create function pg_temp.captures_of(t regclass) returns setof text language sql as
  $$ select regexp_replace(p.proname, '_[0-9a-f]{12}$', '') from pg_trigger g join pg_proc p on p.oid = g.tgfoid
     where g.tgrelid = t and p.pronamespace = 'bridge'::regnamespace order by 1 $$;
create function pg_temp.attempt(who name, statement text) returns text language plpgsql as $$
begin
  execute format('set local role %I', who);
  execute statement;
  reset role;
  return 'done';
exception when others then
  return sqlstate || ' ' || sqlerrm;
end $$;
create role pgbridge_test_watcher in role bridge_operator;
create schema evil authorization pgbridge_test_watcher;

create table t (id int primary key, v int);
select bridge.watch('t');
select results_eq($$ select pg_temp.captures_of('t') $$, array['capture_delete', 'capture_insert', 'capture_update'], 'one for each operation');
select is_empty($$ select from pg_proc where proname like 'capture\_%' and (not prosecdef or proowner <> (select nspowner from pg_namespace where nspname = 'bridge')
  or proconfig[1] <> 'search_path=pg_catalog, bridge, pg_temp') $$, 'they have the owner and the guards of the others');
create temp table before as select pg_temp.captures() as name;
select bridge.watch('t', operations => '{update}');
select results_eq($$ select pg_temp.captures_of('t') $$, array['capture_update'], 'watching again has what was asked for now');
select is_empty('select name from before intersect select pg_temp.captures()', 'in new functions');
select is((select count(*) from pg_temp.captures()), 1::bigint, 'and drops the old ones');
select bridge.unwatch('t');
select is_empty('select pg_temp.captures()', 'unwatch() drops them');
select bridge.watch('t');
create table other (id int primary key);
drop table t;
select isnt_empty('select pg_temp.captures()', 'a table that is dropped leaves them');
select bridge.unwatch('other');
select is_empty('select pg_temp.captures()', 'until the next call of unwatch() of any table');

-- What a name may be.
create table "t'); drop table other; --%s$b$\" (r int primary key, "c'\%I $body$" int, "c" int, head int, tg_relid int, surroundings int, e text);
select bridge.watch('"t''); drop table other; --%s$b$\"', topic => E'it''s \\ %s $body$', columns => array['c''\%I $body$', 'r', 'r', 'tg_relid']);
insert into "t'); drop table other; --%s$b$\" values (1, 2, 3, 4, 5, 6, 'e');
update "t'); drop table other; --%s$b$\" set "c'\%I $body$" = 20;
delete from "t'); drop table other; --%s$b$\";
select results_eq('select topic, key, payload -> ''table'', payload -> ''new'', payload -> ''old'' from pg_temp.last(3)', $$ values
  (E'it''s \\ %s $body$', '1', to_jsonb('t''); drop table other; --%s$b$\'::text), '{"c''\\%I $body$": 2, "r": 1, "tg_relid": 5}'::jsonb, 'null'::jsonb),
  (E'it''s \\ %s $body$', '1', to_jsonb('t''); drop table other; --%s$b$\'::text), '{"c''\\%I $body$": 20, "r": 1, "tg_relid": 5}', '{"c''\\%I $body$": 2, "r": 1, "tg_relid": 5}'),
  (E'it''s \\ %s $body$', '1', to_jsonb('t''); drop table other; --%s$b$\'::text), 'null', '{"c''\\%I $body$": 20, "r": 1, "tg_relid": 5}') $$, 'names are literals');
set local standard_conforming_strings = off;
insert into "t'); drop table other; --%s$b$\" (r) values (2);
set local standard_conforming_strings = on;
select is((select count(*) from bridge.emitted() where topic = E'it''s \\ %s $body$'), 4::bigint, 'whatever the session takes a backslash for');
create table named_r (id int primary key, r int, "table" text);
select bridge.watch('named_r');
insert into named_r values (1, 2, 'x');
select is((select payload -> 'new' from pg_temp.last(1)), '{"id": 1, "r": 2, "table": "x"}', 'columns may be named as what the function names its rows');
select lives_ok(format('create table wide (%s, primary key (c1, c2)); select bridge.watch(''wide'', columns => %L); insert into wide (c1, c2) values (1, 2)',
  (select string_agg(format('c%s int', i), ', ') from generate_series(1, 120) i), (select array_agg('c' || i) from generate_series(1, 120) i)), '120 columns are watched');
select is((select count(*) from jsonb_object_keys((select payload -> 'new' from pg_temp.last(1)))), 120::bigint, 'and all of them shown');
update wide set c120 = 7;
select is((select payload #> '{new,c120}' from pg_temp.last(1)), '7', 'the last one too');

-- Renamed and moved.
create table moved (id int primary key, v int);
select bridge.watch('moved');
create schema elsewhere;
alter table moved rename to "Moved";
alter table "Moved" set schema elsewhere;
insert into elsewhere."Moved" values (1, 1);
select results_eq('select topic, payload ->> ''schema'', payload ->> ''table'' from pg_temp.last(1)', $$ values ('public.moved.inserted', 'elsewhere', 'Moved') $$,
  'a table that was renamed and moved has its name of now');
alter table elsewhere."Moved" add column w int default 7;
update elsewhere."Moved" set v = 2;
select is((select payload -> 'new' from pg_temp.last(1)), '{"id": 1, "v": 2, "w": 7}', 'a column that is added is shown at once');
select results_eq($$ select pg_temp.captures_of('elsewhere."Moved"') $$, array['capture_delete', 'capture_insert', 'capture_update'], 'and it can still be unwatched');

-- Triggers that watch() made before it wrote functions.
create table old (id int primary key, v int);
create trigger bridge_watch_insert after insert on old referencing new table as new_rows
  for each statement execute function bridge.capture('was.old', '{id}', '');
insert into old values (1, 1);
select is((select topic from pg_temp.last(1)), 'was.old', 'old triggers go on');
select bridge.watch('old');
select results_eq($$ select pg_temp.captures_of('old') $$, array['capture_delete', 'capture_insert', 'capture_update'], 'until the table is watched again');
create trigger also_old after insert on old referencing new table as new_rows
  for each statement execute function bridge.capture('was.old', '{id}', '');
select bridge.unwatch('old');
select is_empty($$ select pg_temp.captures_of('old') $$, 'or unwatched');

-- By hand: helpers.
create table victim (id int primary key, v int);
select bridge.watch('victim');
truncate before;
insert into before select pg_temp.captures();
select is(pg_temp.attempt('pgbridge_test_watcher', $$ select bridge.drop_captures() $$), 'done', 'whoever drops functions by hand');
select set_eq('select name from before', 'select pg_temp.captures()', 'drops none that a trigger calls');
select is(pg_temp.attempt('pgbridge_test_watcher', $$ select bridge.write_capture('insert', 'mine', '{id}', null) $$), 'done', 'whoever writes one by hand');
select is_empty('select name from before except select pg_temp.captures()', 'replaces none');
insert into victim values (1, 1);
select is((select topic from pg_temp.last(1)), 'public.victim.inserted', 'and changes no table''s events');
select is(pg_temp.attempt('pgbridge_test_watcher', format('select bridge.write_capture(%L, ''t'', ''{id}'', null)', o)),
  '22023 bridge.write_capture() is for bridge.watch()', 'an operation is one of three: ' || coalesce(o, 'null'))
  from unnest(array['insert'', 1); drop table victim; --', null, 'INSERT']) as o;
select is(pg_temp.attempt('pgbridge_test_watcher', format('drop function bridge.%I()', (select min(name) from before))) ~ '^42501', true, 'nobody else drops them');
select bridge.drop_captures();

-- By hand: triggers. The function that these attacks would run says whose rights it got, in place of the refusal.
create function pg_temp.capture_of(t regclass, operation text) returns text language sql as
  $$ select g.tgfoid::regproc::text from pg_trigger g where g.tgrelid = t and g.tgname = 'bridge_watch_' || operation $$;
create function pg_temp.by_hand(operation text, clauses text, more text default '') returns text language sql as
  $$ select pg_temp.attempt('pgbridge_test_watcher', format('
    create function evil.steal() returns int language plpgsql as ''begin raise exception ''''ran as %%'''', current_user; end'';
    create table evil.t (id int, castsource oid default 1, casttarget oid default 1);
    insert into evil.t values (1);
    %s;
    create trigger sneak after %s on evil.t %s execute function %s();
    %s', more, operation, clauses, pg_temp.capture_of('victim', operation),
    case operation when 'insert' then 'insert into evil.t values (2)' when 'update' then 'update evil.t set id = 3' else 'delete from evil.t' end)) $$;
create function pg_temp.hostile_view(name text) returns text language sql as
  $$ select format('create temp view %I as select evil.steal() as id', name) $$;
create temp table refused as select '39P01 bridge.capture() serves no trigger but those of bridge.watch()' as words;
select is(pg_temp.by_hand('insert', 'for each statement', pg_temp.hostile_view('new_rows')), words, 'a view in place of the new rows') from refused;
select is(pg_temp.by_hand('delete', 'for each statement', pg_temp.hostile_view('old_rows')), words, 'of the old rows') from refused;
select is(pg_temp.by_hand('update', 'referencing new table as new_rows for each statement', pg_temp.hostile_view('old_rows')), words,
  'of the old rows of an update') from refused;
select is(pg_temp.by_hand('insert', 'referencing new table as new_rows for each row'), words, 'a trigger for each row') from refused;
-- A type's cast runs while the first of the two is read; so it must not be hidden by the name of the second.
create temp table hostile_cast as select 'create type evil.e as enum (''a'');
  create function evil.cast_e(evil.e) returns json language plpgsql as ''begin perform evil.steal(); return ''''1''''; end'';
  create cast (evil.e as json) with function evil.cast_e(evil.e);
  alter table evil.t add column e evil.e default ''a''' as statements;
select alike(pg_temp.by_hand('update', 'referencing new table as new_rows old table as pg_cast for each statement', statements), '42501 a cast to json%',
  'a transition table in place of the catalog') from hostile_cast;
select alike(pg_temp.by_hand('insert', 'referencing new table as new_rows for each statement', statements), '42501 a cast to json%',
  'a cast that was made after watch()') from hostile_cast;
select is(pg_temp.attempt('pgbridge_test_watcher', $$
  create type evil.n as enum ('sneak');
  create function evil.name_of(evil.n) returns name language plpgsql as 'begin raise exception ''ran as %'', current_user; end';
  create cast (evil.n as name) with function evil.name_of(evil.n) as implicit;
  create table evil.t (tgrelid oid, tgname evil.n, tgnewtable name, tgoldtable name, id int);
  insert into evil.t values ('evil.t'::regclass, 'sneak', 'new_rows', 'old_rows', 1);
  create trigger sneak after update on evil.t referencing new table as new_rows old table as pg_trigger
    for each statement execute function bridge.capture('x', '{id}', '');
  update evil.t set id = 2 $$), words, 'and capture() believes no such table either') from refused;
select is((select prosrc from pg_proc where oid = pg_temp.capture_of('victim', 'update')::regproc) ~ 'pg_current_xact_id\(\) is not null then nextval', true,
  'the transaction id before the sequence''s value');
select * from finish();
