-- append_event() is SECURITY DEFINER without a fixed search_path: nothing of the caller's may take the place of ours.
select plan(8);
create role pgbridge_test_evil in role bridge_emitter;
create schema evil authorization pgbridge_test_evil;
set local role pgbridge_test_evil;
create domain evil.uuid as text;
create domain evil.xid8 as text;
create domain evil.jsonb as text;
create function evil.trap() returns boolean language plpgsql as 'begin raise exception ''trapped as %'', current_user; end';
create function evil.trap(text, text) returns boolean language sql as 'select evil.trap()';
create function evil.trap(int, int) returns boolean language sql as 'select evil.trap()';
create function evil.trap(pg_catalog.jsonb, pg_catalog.jsonb) returns boolean language sql as 'select evil.trap()';
create function evil.merge(pg_catalog.jsonb, pg_catalog.jsonb) returns pg_catalog.jsonb language sql as 'select to_jsonb(evil.trap())';
create operator evil.= (leftarg = text, rightarg = text, function = evil.trap);
create operator evil.<> (leftarg = text, rightarg = text, function = evil.trap);
create operator evil.> (leftarg = int, rightarg = int, function = evil.trap);
create operator evil.<> (leftarg = pg_catalog.jsonb, rightarg = pg_catalog.jsonb, function = evil.trap);
create operator evil.|| (leftarg = pg_catalog.jsonb, rightarg = pg_catalog.jsonb, function = evil.merge);
create function evil.nextval(regclass) returns bigint language sql as 'select evil.trap()::int::bigint';
create function evil.pg_current_xact_id() returns pg_catalog.xid8 language sql as 'select evil.trap()::text::pg_catalog.xid8';
create function evil.gen_random_uuid() returns pg_catalog.uuid language sql as 'select evil.trap()::text::pg_catalog.uuid';
create function evil.octet_length(text) returns int language sql as 'select evil.trap()::int';
create function evil.current_setting(text, boolean) returns text language sql as 'select evil.trap()::text';
create function evil.pg_notify(text, text) returns void language plpgsql as 'begin perform evil.trap(); end';
create temp table bell (asleep boolean);
reset role;
insert into bridge.bell values ('asleep', true);
grant select on all tables in schema pg_temp to pgbridge_test_evil;
create function pg_temp.attempt(statement text) returns text language plpgsql as $$
begin
  set local role pgbridge_test_evil;
  perform pg_catalog.set_config('search_path', 'pg_temp, evil, public, pg_catalog', true);
  execute statement;
  perform pg_catalog.set_config('search_path', 'public', true);
  reset role;
  return 'done';
exception when others then
  return sqlerrm;
end $$;
select is(pg_temp.attempt($$ select 'a' operator(evil.=) 'b' $$), 'trapped as pgbridge_test_evil', 'the trap works');
select is(pg_temp.attempt($$ select bridge.emit('t', 'x') $$), 'done', 'emit() of text');
select is(pg_temp.attempt($$ select bridge.emit('t', '{}'::pg_catalog.jsonb, 'k', '{"a": 1}') $$), 'done', 'emit() of jsonb with headers');
select is(pg_temp.attempt($$ select bridge.emit('t', '{}'::json) $$), 'done', 'emit() of json');
select is(pg_temp.attempt($$ select bridge.notify('t', 'x') $$), 'done', 'notify()');
select set_config('bridge.actor', '{"sub": "a"}', true);
select is(pg_temp.attempt($$ select bridge.emit('t', 'x', headers => '{"b": 1}') $$), 'done', 'emit() with context');
select is((select headers from bridge.emitted() order by id desc limit 1), '{"b": 1, "actor": {"sub": "a"}}', 'is whole');
select is(pg_temp.attempt($$ select bridge.emit('', 'x') $$), 'the topic of an event is empty', 'and so is a refusal');
select * from finish();
