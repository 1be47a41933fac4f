-- Least privilege: one group role per process. Run after every migration; running it again changes nothing.
-- Login roles are yours to create: `create role web login in role bridge_emitter`, `grant bridge_relay to relay`.
-- Whoever writes to a table whose trigger calls bridge.emit() must be in bridge_emitter, unless the
-- trigger's function is SECURITY DEFINER; tables under bridge.watch() ask nothing of their writers.

do $$
declare
  name text;
begin
  foreach name in array array['bridge_emitter', 'bridge_relay', 'bridge_worker', 'bridge_operator', 'bridge_viewer'] loop
    if not exists (select from pg_catalog.pg_roles where rolname = name) then
      begin
        execute format('create role %I nologin', name);
      exception when duplicate_object or unique_violation then
        null; -- Roles belong to the whole cluster: a migration of another database has just created it.
      end;
    end if;
  end loop;
end
$$;

revoke all on schema bridge from public;
revoke all on all tables in schema bridge from public;
revoke all on all sequences in schema bridge from public;
revoke all on all routines in schema bridge from public;
grant usage on schema bridge to bridge_emitter, bridge_relay, bridge_worker, bridge_operator, bridge_viewer;

-- bridge_emitter: those who record events. -----------------------------------------------------------------

grant execute on function
  bridge.emit(text, jsonb, text, jsonb),
  bridge.emit(text, json, text, jsonb),
  bridge.emit(text, text, text, jsonb),
  bridge.emit(text, jsonb, timestamptz, jsonb, text),
  bridge.emit(text, json, timestamptz, jsonb, text),
  bridge.emit(text, text, timestamptz, jsonb, text),
  bridge.cancel(uuid),
  bridge.notify(text, text),
  bridge.append_event(text, text, text, text, jsonb),
  bridge.schedule_event(text, text, text, text, jsonb, timestamptz),
  bridge.emitted()
to bridge_emitter;

-- bridge_relay: the daemon. --------------------------------------------------------------------------------

grant select on bridge.outbox, bridge.migration, bridge.event_schema, bridge.sample,
  bridge.pause_audit to bridge_relay;
grant select on sequence bridge.outbox_id_seq to bridge_relay; -- to see that it is not behind the log
grant select, insert, update on bridge.leader, bridge.bell to bridge_relay;
grant select, insert, update, delete on bridge.cursor to bridge_relay;
grant insert on bridge.dead_letter to bridge_relay;
-- To say ON CONFLICT (bridge, event_id, coalesce(sink, '')) one must be allowed to read these.
grant select (bridge, event_id, sink) on bridge.dead_letter to bridge_relay;
grant execute on function bridge.intake(text[], text[]), bridge.intake(uuid[], text[], text[]) to bridge_relay;

grant execute on function
  bridge.prune(timestamptz, int, bigint),
  bridge.status(),
  bridge.status(int),
  bridge.guards(),
  bridge.read_page(bigint, int8multirange, boolean, xid8[], int, bigint, text[], boolean),
  bridge.topic_regex(text[]),
  bridge.topic_test(text[]),
  bridge.takes(text, text[], text),
  bridge.split_page(bigint, int, text[], text, boolean),
  bridge.event_bytes(text, text, jsonb),
  bridge.calendar_time(timestamptz),
  bridge.header_texts(jsonb),
  bridge.any_header_texts(jsonb),
  bridge.floor_of(bigint, int8multirange, int8multirange),
  bridge.sequence_state(),
  bridge.lead_key(text),
  bridge.take_lead(text, text),
  bridge.begin_reading(text, jsonb),
  bridge.leave_lead(text),
  bridge.store_cursor(text, text, bigint, int8multirange, int8multirange, bigint[]),
  bridge.store_problem(text, text, text, double precision),
  bridge.take_horizon(),
  bridge.set_asleep(text, boolean),
  bridge.paused_sinks(text),
  bridge.worker_status(text[]),
  bridge.worker_status(text[], int),
  bridge.move_due(timestamptz, timestamptz, bigint, int, bigint),
  bridge.scheduled_status(),
  -- `pgbridge asyncapi`
  bridge.watches(regclass),
  bridge.watch_of(regclass),
  bridge.json_object(text),
  bridge.store_samples(text, text[], double precision, jsonb[], jsonb[], double precision)
to bridge_relay;

-- bridge_worker: the worker processes. ---------------------------------------------------------------------
-- A reply function is its author's to grant: `grant execute on function shop.invoice_rendered to bridge_worker`.

grant execute on function
  bridge.inbox_claim(text, uuid[], text[], bigint, bigint[], double precision[], boolean),
  bridge.inbox_claim_holding(text, uuid[], text[], text[], bigint, bigint[], double precision[], boolean),
  bridge.inbox_finish(text, uuid, bigint, int, jsonb),
  bridge.inbox_finish_unclaimed(text, uuid, jsonb),
  bridge.inbox_finish_together(text, uuid[], bigint[], int[], jsonb[]),
  bridge.inbox_end(text, uuid[], bigint[], int[], jsonb[], text, text),
  bridge.inbox_give_up(text, uuid[], bigint[], int[], int[], double precision[], jsonb[]),
  bridge.inbox_give_up_holding(text, uuid[], bigint[], int[], int[], double precision[], jsonb[], text[]),
  bridge.inbox_forget(text, uuid, text),
  bridge.inbox_effect_begin(text, uuid, bigint, int, text, jsonb),
  bridge.inbox_effect_again(text, uuid, bigint, int, text, text, jsonb),
  bridge.inbox_effect_end(text, uuid, bigint, int, text, jsonb),
  bridge.inbox_prune(text, timestamptz, int),
  bridge.held_keys(text),
  bridge.worker_pause(text),
  bridge.store_worker_sample(text, double precision, jsonb, jsonb, double precision),
  bridge.rate_take(text, int, double precision, double precision),
  -- `pgbridge-worker reconcile` and `listen`
  bridge.open_effects(text, timestamptz),
  bridge.settle_effect(text, uuid, text, jsonb, text),
  bridge.audit_dead_letter(text, text, uuid, text, text, text, text, text),
  bridge.receive_notice(text, text, text, text, text),
  bridge.prune_notices(text, timestamptz, int),
  -- `workers.webhooks` and `pgbridge-worker deliver`
  bridge.webhook_fan_out(uuid, jsonb),
  bridge.webhook_claim(int, bigint, double precision, bigint[]),
  bridge.webhook_next(),
  bridge.webhook_record(bigint[], int[], int[], double precision[], text[], text[], double precision[], double precision[]),
  bridge.webhook_backlog(),
  bridge.webhook_prune(timestamptz, int)
to bridge_worker;

-- bridge_operator: people. ---------------------------------------------------------------------------------

grant select on all tables in schema bridge to bridge_operator;
revoke all on bridge.webhook_secret from bridge_operator; -- shown once, to whoever adds an endpoint or rotates
grant select on sequence bridge.outbox_id_seq to bridge_operator;
grant insert on bridge.dead_letter to bridge_operator; -- what a replay finds refused
-- Dead letters leave only through functions that write down who took them away.
grant execute on function
  bridge.end_dead_letters(bigint[], text, text, text),
  bridge.refuse_dead_letter(bigint, text, text, int),
  bridge.audit_dead_letter(text, text, uuid, text, text, text, text, text),
  bridge.release_held(text, text, uuid, text),
  bridge.set_pause(text, text, text, text, text),
  bridge.end_pause(text, text, text),
  bridge.end_pause(text, text, text, text),
  bridge.paused_sinks(text),
  bridge.worker_pause(text),
  bridge.worker_status(text[]),
  bridge.worker_status(text[], int),
  bridge.worker_processes(text[], int),
  bridge.worker_events(text, int, int),
  bridge.keys_held(text, bigint, int, int),
  bridge.find_event(uuid, bigint, int),
  bridge.event_in_log(bigint),
  bridge.event_positions(bigint, text),
  bridge.event_inbox(uuid),
  bridge.search_events(bigint, bigint, int, int, bigint, text[], text, timestamptz, timestamptz, text, text, text),
  bridge.event_neighbours(bigint, text, int, int),
  bridge.event_content(bigint, int),
  bridge.set_worker_login(text, name),
  bridge.scheduled_status(),
  bridge.cancel(uuid),
  bridge.register_schema(text, json, text, text),
  bridge.unregister_schema(text),
  bridge.open_effects(text, timestamptz),
  bridge.settle_effect(text, uuid, text, jsonb, text),
  bridge.add_endpoint(text, text[], text, int, double precision, text),
  bridge.change_endpoint(bigint, text, text[], text, int, double precision),
  bridge.rotate_secret(bigint, interval, text),
  bridge.disable_endpoint(bigint, text),
  bridge.enable_endpoint(bigint),
  bridge.recover_endpoint(bigint, timestamptz),
  bridge.remove_endpoint(bigint),
  bridge.resend_delivery(bigint),
  bridge.endpoint_deliveries(bigint, int),
  bridge.list_endpoints(bigint, int, int),
  bridge.count_recoverable(bigint, timestamptz, int),
  bridge.position_at(timestamptz),
  bridge.set_position(text, text, bigint),
  bridge.forget_position(text, text),
  bridge.events_between(text, text, bigint, bigint, int),
  bridge.sequence_state(),
  bridge.status(),
  bridge.status(int),
  bridge.guards(),
  bridge.read_page(bigint, int8multirange, boolean, xid8[], int, bigint, text[], boolean),
  bridge.topic_regex(text[]),
  bridge.topic_test(text[]),
  bridge.takes(text, text[], text),
  bridge.split_page(bigint, int, text[], text, boolean),
  bridge.event_bytes(text, text, jsonb),
  bridge.calendar_time(timestamptz),
  bridge.header_texts(jsonb),
  bridge.any_header_texts(jsonb),
  bridge.take_horizon()
to bridge_operator;
-- Backfilling a table takes the right to read and lock its rows besides, since these functions read it as their caller.
grant execute on function
  bridge.begin_backfill(regclass, text, text, boolean),
  bridge.backfill_chunk(bigint, int, int),
  bridge.backfill_skipped(bigint, int),
  bridge.backfill_rows(bridge.backfill, regclass, text, boolean),
  bridge.require_backfill(bigint),
  bridge.backfill_lock(oid),
  bridge.open_backfill(text, text, oid, text[], text, text[], text[], bigint, text),
  bridge.record_read(bigint, text, text),
  bridge.advance_backfill(bigint, bigint, jsonb, jsonb, boolean),
  bridge.end_backfill(text, text, text),
  bridge.watch_of(regclass),
  bridge.primary_key(regclass),
  bridge.key_condition(text[], text[], text, text, jsonb),
  bridge.watched_key(text, text[]),
  bridge.watched_part(text, text[]),
  bridge.json_object(text),
  bridge.refuse_foreign_casts(regclass),
  bridge.sinks_behind(text)
to bridge_operator;
-- Watching a table takes its owner, and more trust than emitting: its rows are converted with the rights of the
-- owner of schema bridge. So it is not for bridge_emitter, which a web role may have.
grant execute on function
  bridge.watch(regclass, text, text, text[], text[]),
  bridge.unwatch(regclass),
  bridge.watches(regclass),
  bridge.write_capture(text, text, text[], text[]),
  bridge.drop_captures(),
  bridge.check_topic(text),
  bridge.capture()
to bridge_operator;

-- bridge_viewer: people who look, and change nothing. ------------------------------------------------------

grant select on all tables in schema bridge to bridge_viewer;
revoke all on bridge.webhook_secret from bridge_viewer;
grant select on sequence bridge.outbox_id_seq to bridge_viewer;
grant execute on function
  bridge.status(),
  bridge.status(int),
  bridge.guards(),
  bridge.scheduled_status(),
  bridge.paused_sinks(text),
  bridge.worker_pause(text),
  bridge.worker_status(text[]),
  bridge.worker_status(text[], int),
  bridge.worker_processes(text[], int),
  bridge.worker_events(text, int, int),
  bridge.keys_held(text, bigint, int, int),
  bridge.find_event(uuid, bigint, int),
  bridge.event_in_log(bigint),
  bridge.event_positions(bigint, text),
  bridge.event_inbox(uuid),
  bridge.search_events(bigint, bigint, int, int, bigint, text[], text, timestamptz, timestamptz, text, text, text),
  bridge.event_neighbours(bigint, text, int, int),
  bridge.event_content(bigint, int),
  bridge.open_effects(text, timestamptz),
  bridge.endpoint_deliveries(bigint, int),
  bridge.list_endpoints(bigint, int, int),
  bridge.count_recoverable(bigint, timestamptz, int),
  bridge.position_at(timestamptz),
  bridge.events_between(text, text, bigint, bigint, int),
  bridge.sequence_state(),
  bridge.topic_regex(text[]),
  bridge.topic_test(text[]),
  bridge.takes(text, text[], text),
  bridge.event_bytes(text, text, jsonb),
  bridge.calendar_time(timestamptz),
  bridge.header_texts(jsonb),
  bridge.any_header_texts(jsonb)
to bridge_viewer;
