-- Who may do what: each role what its process needs, everybody else nothing.
select plan(171);
create role pgbridge_test_nobody;
create function pg_temp.attempt(who name, statement text) returns text language plpgsql as $$
begin
  execute format('set local role %I', who);
  execute statement;
  reset role;
  return 'done';
exception when others then
  return sqlstate;
end $$;
create function pg_temp.may(who name, statement text) returns text language sql as
  $$ select is(pg_temp.attempt(who, statement), 'done', who || ' may ' || statement) $$;
create function pg_temp.may_not(who name, statement text) returns text language sql as
  $$ select is(pg_temp.attempt(who, statement), '42501', who || ' may not ' || statement) $$;

select pg_temp.may_not('pgbridge_test_nobody', 'select bridge.emit(''t'', ''x'')');
select is_empty(
  $$ select p.oid::regprocedure from pg_proc p cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
     where p.pronamespace = 'bridge'::regnamespace and a.grantee = 0 $$, 'PUBLIC may execute nothing');
select is_empty(
  $$ select c.oid::regclass from pg_class c cross join lateral aclexplode(c.relacl) a
     where c.relnamespace = 'bridge'::regnamespace and a.grantee = 0 $$, 'PUBLIC may touch no table');
select is_empty(
  $$ select from pg_namespace n cross join lateral aclexplode(n.nspacl) a where n.nspname = 'bridge' and (a.grantee = 0
     or a.privilege_type = 'CREATE' and a.grantee <> n.nspowner) $$, 'and nobody but the owner may create in the schema');
select is_empty(
  $$ select p.oid::regprocedure from pg_proc p where p.pronamespace = 'bridge'::regnamespace and p.prosecdef
     and p.proname <> 'append_event' -- see search_path.sql
     and not coalesce(array_to_string(p.proconfig, ';') ~ 'search_path=pg_catalog, bridge, pg_temp', false) $$,
  'every SECURITY DEFINER function has its search_path fixed');
select is_empty(
  $$ select rolname from pg_roles where rolname ~ '^bridge_(emitter|relay|worker|operator|viewer)$' and (rolcanlogin or rolsuper or rolcreaterole) $$,
  'the roles are groups without powers');

select pg_temp.may('bridge_emitter', 'select bridge.emit(''t'', ''x'')');
select pg_temp.may('bridge_emitter', 'select bridge.emit(''t'', ''{}''::jsonb, ''k'', ''{"a": 1}'')');
select pg_temp.may('bridge_emitter', 'select bridge.emit(''t'', ''{}''::json)');
select pg_temp.may('bridge_emitter', 'select bridge.emit(''t'', ''x'', at => now() + interval ''1 hour''), bridge.emit(''t'', ''{}''::json, at => now()), bridge.emit(''t'', ''{}''::jsonb, at => null)');
select pg_temp.may('bridge_emitter', 'select bridge.cancel(gen_random_uuid())');
select pg_temp.may_not('bridge_emitter', 'select from bridge.scheduled');
select pg_temp.may('bridge_emitter', 'select bridge.notify(''c'', ''x'')');
select pg_temp.may('bridge_emitter', 'select * from bridge.emitted()');
select pg_temp.may_not('bridge_emitter', 'insert into bridge.outbox (topic, payload, content_type) values (''t'', ''x'', ''text/plain'')');
select pg_temp.may_not('bridge_emitter', 'select from bridge.outbox');
select pg_temp.may_not('bridge_emitter', 'select nextval(''bridge.outbox_id_seq'')');
select pg_temp.may_not('bridge_emitter', 'select bridge.intake(''{a}'', ''{b}'')');
select pg_temp.may_not('bridge_emitter', 'select bridge.watch(''pg_class'')');

select pg_temp.may('bridge_relay', 'select from bridge.outbox');
select pg_temp.may('bridge_relay', 'select from bridge.migration');
select pg_temp.may('bridge_relay', 'select bridge.intake(''{a}'', ''{b}'')');
select pg_temp.may('bridge_relay', 'select bridge.intake(array[gen_random_uuid()], ''{a}'', ''{b}'')');
select pg_temp.may('bridge_relay', 'select bridge.header_texts(''{"a": 1}'')');
select pg_temp.may('bridge_operator', 'select bridge.header_texts(''{"a": 1}'')');
select pg_temp.may('bridge_relay', 'insert into bridge.bell values (''test'')');
select pg_temp.may('bridge_relay', 'update bridge.cursor set mark = mark where name = ''test''');
select pg_temp.may('bridge_relay', $$ insert into bridge.dead_letter (bridge, event_id, sequence, topic, payload, content_type, headers, created_at, code, reason, attempts)
  values ('b', gen_random_uuid(), 1, 't', 'p', 'text/plain', '{}', now(), 'c', 'r', 1) on conflict (bridge, event_id, coalesce(sink, '')) do nothing $$);
select pg_temp.may_not('bridge_relay', 'delete from bridge.dead_letter');
select pg_temp.may_not('bridge_relay', 'select payload from bridge.dead_letter');
select pg_temp.may_not('bridge_relay', 'insert into bridge.outbox (topic, payload, content_type) values (''t'', ''x'', ''text/plain'')');
select pg_temp.may_not('bridge_relay', 'update bridge.outbox set topic = ''x''');
select pg_temp.may_not('bridge_relay', 'select bridge.emit(''t'', ''x'')');
select pg_temp.may('bridge_relay', 'select from bridge.prune(now(), 10, 0)');
select pg_temp.may('bridge_relay', 'select from bridge.status(), bridge.status(9) s9, bridge.guards()');
select pg_temp.may_not('bridge_relay', 'select bridge.end_dead_letters(''{1}'', ''discarded'', ''me'', ''why'')');

select pg_temp.may_not('bridge_worker', 'select from bridge.outbox');
select pg_temp.may_not('bridge_worker', 'select bridge.emit(''t'', ''x'')');
select pg_temp.may_not('bridge_worker', 'update bridge.cursor set mark = 0');
select pg_temp.may('bridge_worker', 'select from bridge.rate_take(''w'', 1, 1, 1)');
select pg_temp.may_not('bridge_worker', 'delete from bridge.rates');
select pg_temp.may_not('bridge_relay', 'select from bridge.rate_take(''w'', 1, 1, 1)');
select pg_temp.may('bridge_worker', 'select from bridge.inbox_claim_holding(''w'', ''{}'', ''{}'', ''{}'', 1, ''{}'', ''{}'', false)');
select pg_temp.may('bridge_worker', 'select bridge.held_keys(''w'')');
select pg_temp.may_not('bridge_worker', 'delete from bridge.held');
select pg_temp.may_not('bridge_worker', 'select bridge.release_held(''w'', ''k'', null, ''me'')');

insert into bridge.webhook_endpoint (url, topics, likes) values ('https://example.com', '{none}', '{none}');
select pg_temp.may('bridge_worker', 'select bridge.webhook_fan_out(gen_random_uuid(), ''{"topic": "t", "body": "b"}'')');
select pg_temp.may('bridge_worker', 'select from bridge.webhook_claim(1, 1, 1, ''{}'')');
select pg_temp.may('bridge_worker', 'select from bridge.webhook_next(), bridge.webhook_backlog(), bridge.webhook_prune(now(), 1)');
select pg_temp.may('bridge_worker', 'select from bridge.webhook_record(''{}'', ''{}'', ''{}'', ''{}'', ''{}'', ''{}'', ''{}'', ''{}'')');
select pg_temp.may_not('bridge_worker', 'select from bridge.' || t) from unnest(array['webhook_secret', 'webhook_endpoint', 'webhook_message', 'webhook_delivery']) t;
select pg_temp.may_not('bridge_worker', 'select bridge.add_endpoint(''https://example.com'', ''{t}'')');
select pg_temp.may_not(who, 'select from bridge.webhook_claim(1, 1, 1, ''{}'')') from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_operator']::name[]) who;
select pg_temp.may('bridge_operator', 'select from bridge.webhook_endpoint, bridge.webhook_endpoints, bridge.webhook_message, bridge.webhook_delivery, bridge.webhook_attempt');
select pg_temp.may_not('bridge_operator', 'select from bridge.webhook_secret');
select pg_temp.may_not('bridge_operator', 'update bridge.webhook_endpoint set url = ''x''');
select pg_temp.may('bridge_operator', 'select bridge.add_endpoint(''https://example.com'', ''{t}'')');
select pg_temp.may('bridge_operator', 'select bridge.' || call || ' from (select max(id) as id from bridge.webhook_endpoint) e') from unnest(array['change_endpoint(id, concurrency => 2)',
  'rotate_secret(id)', 'disable_endpoint(id)', 'enable_endpoint(id)', 'recover_endpoint(id, now())', 'endpoint_deliveries(id)', 'remove_endpoint(id)']) call;
select pg_temp.may('bridge_operator', 'select from bridge.outbox, bridge.cursor, bridge.bell, bridge.dead_letter, bridge.migration, bridge.inbox');
select pg_temp.may('bridge_operator', 'select bridge.end_dead_letters(''{1}'', ''discarded'', ''me'', ''why'')');
select pg_temp.may('bridge_operator', 'select from bridge.status(), bridge.status(9) s9, bridge.guards(), bridge.read_page(0, ''{}'', true, ''{}'', 1, 1, null, false)');
select pg_temp.may('bridge_operator', 'select bridge.release_held(''w'', ''k'', null, ''me'')');
select pg_temp.may('bridge_operator', 'select from bridge.held');
select pg_temp.may_not('bridge_operator', 'delete from bridge.held');
select pg_temp.may_not('bridge_operator', 'delete from bridge.dead_letter');
select pg_temp.may_not('bridge_operator', 'delete from bridge.dead_letter_audit');
select pg_temp.may_not('bridge_operator', 'update bridge.dead_letter_audit set person = ''x''');
select pg_temp.may_not('bridge_operator', 'select from bridge.prune(now(), 10, 0)');
select pg_temp.may_not('bridge_operator', 'delete from bridge.outbox');
select pg_temp.may_not('bridge_operator', 'update bridge.cursor set mark = 0');
select pg_temp.may_not('bridge_operator', 'insert into bridge.outbox (topic, payload, content_type) values (''t'', ''x'', ''text/plain'')');
select pg_temp.may_not('bridge_operator', 'select bridge.watch(''pg_catalog.pg_class'')');
select pg_temp.may('bridge_operator', 'select bridge.set_pause(''sink'', ''b'', ''s'', ''me'', ''''), bridge.end_pause(''sink'', ''b'', ''s''), bridge.end_pause(''sink'', ''b'', ''s'', ''me'')');
select pg_temp.may('bridge_operator', 'select from bridge.worker_status(''{w}''), bridge.worker_status(''{w}'', 9) w9, bridge.find_event(gen_random_uuid(), 9, 9), bridge.event_in_log(1), bridge.event_positions(1, ''t''), bridge.event_inbox(gen_random_uuid())');
select pg_temp.may('bridge_operator', 'select from bridge.pause, bridge.worker_login, bridge.paused_sinks(''b''), bridge.worker_pause(''w'')');
select pg_temp.may('bridge_operator', 'select bridge.set_worker_login(''w'', ''bridge_worker'')');
select pg_temp.may('bridge_relay', 'select from bridge.move_due(null, ''-infinity'', 0, 1, 1), bridge.scheduled_status()');
select pg_temp.may_not('bridge_relay', 'select from bridge.scheduled');
select pg_temp.may_not('bridge_relay', 'select bridge.cancel(gen_random_uuid())');
select pg_temp.may('bridge_operator', 'select from bridge.scheduled, bridge.scheduled_status(), bridge.cancel(gen_random_uuid())');
select pg_temp.may_not(who, 'delete from bridge.scheduled') from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_worker', 'bridge_operator', 'bridge_viewer']::name[]) who;
select pg_temp.may_not(who, 'select from bridge.move_due(null, ''-infinity'', 0, 1, 1)') from unnest(array['bridge_emitter', 'bridge_worker', 'bridge_operator']::name[]) who;
select pg_temp.may('bridge_relay', 'select from bridge.paused_sinks(''b''), bridge.worker_status(''{}''), bridge.worker_status(''{}'', 9) w9');
select pg_temp.may('bridge_worker', 'select from bridge.worker_pause(''w'')');
select pg_temp.may('bridge_viewer', 'select from bridge.status(), bridge.status(9) s9, bridge.guards(), bridge.scheduled_status(), bridge.paused_sinks(''b''), bridge.worker_status(''{w}''), bridge.worker_status(''{w}'', 9) w9');
select pg_temp.may('bridge_viewer', 'select from bridge.outbox, bridge.cursor, bridge.dead_letter, bridge.dead_letter_audit, bridge.inbox, bridge.scheduled, bridge.migration');
select pg_temp.may('bridge_viewer', 'select from bridge.find_event(gen_random_uuid(), 9, 9), bridge.event_in_log(1), bridge.event_positions(1, ''t''), bridge.event_inbox(gen_random_uuid())');
select pg_temp.may_not('bridge_viewer', 'select from bridge.webhook_secret');
select pg_temp.may_not('bridge_viewer', statement) from unnest(array['select bridge.emit(''t'', ''x'')', 'select bridge.set_pause(''sink'', ''b'', ''s'', ''me'', '''')', 'select bridge.end_pause(''sink'', ''b'', ''s'', ''me'')',
  'select bridge.end_dead_letters(''{1}'', ''discarded'', ''me'', ''why'')', 'select bridge.cancel(gen_random_uuid())', 'select bridge.set_position(''b'', ''s'', 1)', 'delete from bridge.dead_letter', 'update bridge.cursor set mark = 0']) statement;
select pg_temp.may_not(who, 'select bridge.' || call) from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_worker']::name[]) who,
  unnest(array['set_pause(''worker'', '''', ''w'', ''me'', '''')', 'end_pause(''worker'', '''', ''w'')', 'event_inbox(gen_random_uuid())', 'set_worker_login(''w'', ''bridge_worker'')']) call;
select pg_temp.may_not('bridge_operator', 'delete from bridge.pause');
select pg_temp.may('bridge_operator', 'select from bridge.backfill, bridge.sinks_behind(''t''), bridge.end_backfill(''s'', ''t'', ''cancelled'')');
select pg_temp.may_not('bridge_operator', 'update bridge.backfill set sent = 0');
select pg_temp.may_not(who, 'select bridge.' || call) from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_worker']::name[]) who,
  unnest(array['begin_backfill(''pg_class'', null, ''me'', false)', 'record_read(1, ''k'', ''{}'')', 'end_backfill(''s'', ''t'', ''cancelled'')']) call;

select pg_temp.may('bridge_operator', 'select bridge.register_schema(''t'', ''{}''), bridge.unregister_schema(''t'')');
select pg_temp.may_not(who, 'select bridge.register_schema(''t'', ''{}'')') from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_worker']::name[]) who;
select pg_temp.may_not(who, 'select bridge.unregister_schema(''t'')') from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_worker']::name[]) who;
select pg_temp.may_not('bridge_operator', 'insert into bridge.event_schema values (''t'', ''{}'', '''', ''text/plain'')');
create table public.pgbridge_test_watched (id int primary key);
select bridge.watch('public.pgbridge_test_watched');
select pg_temp.may(who, 'select from bridge.watches(), bridge.watch_of(''public.pgbridge_test_watched''), bridge.event_schema')
  from unnest(array['bridge_operator', 'bridge_relay']::name[]) who;
select pg_temp.may_not(who, 'select from bridge.watches()') from unnest(array['bridge_emitter', 'bridge_worker']::name[]) who;
select pg_temp.may('bridge_relay', 'select from bridge.store_samples(''b'', ''{null,s}'', 15, ''{"{}","{}"}'', ''{"{}","{}"}'', 0.5)');
select pg_temp.may('bridge_worker', 'select from bridge.store_worker_sample(''w'', 15, ''{}'', ''{}'', 0.5)');
select pg_temp.may_not(who, 'select from bridge.store_samples(''b'', ''{s}'', 15, ''{"{}"}'', ''{"{}"}'', 0.5)') from unnest(array['bridge_emitter', 'bridge_worker', 'bridge_operator', 'bridge_viewer']::name[]) who;
select pg_temp.may_not(who, 'select from bridge.store_worker_sample(''w'', 15, ''{}'', ''{}'', 0.5)') from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_operator', 'bridge_viewer']::name[]) who;
select pg_temp.may(who, 'select from bridge.worker_processes(''{w}'', 1), bridge.worker_events(''w'', 1, 1), bridge.keys_held(''w'', 0, 1, 1), bridge.list_endpoints(), bridge.endpoint_deliveries(1)') from unnest(array['bridge_operator', 'bridge_viewer']::name[]) who;
select pg_temp.may_not(who, 'select from bridge.worker_events(''w'', 1, 1)') from unnest(array['bridge_emitter', 'bridge_relay', 'bridge_worker']::name[]) who;
select pg_temp.may('bridge_viewer', 'select bridge.count_recoverable(id, now()) from bridge.webhook_endpoint');
select pg_temp.may(who, 'select from bridge.sample, bridge.event_neighbours(1, ''k'', 1, 1), bridge.event_content(1, 1), bridge.search_events(1, 0, 1, 1, 1, null, null, null, null, null, null, null)') from unnest(array['bridge_operator', 'bridge_viewer']::name[]) who;
select pg_temp.may('bridge_relay', 'select from bridge.sample, bridge.pause_audit');
select pg_temp.may_not(who, 'select from bridge.sample') from unnest(array['bridge_emitter', 'bridge_worker']::name[]) who;
select pg_temp.may_not('bridge_worker', 'select from bridge.search_events(1, 0, 1, 1, 1, null, null, null, null, null, null, null)');
select * from finish();
