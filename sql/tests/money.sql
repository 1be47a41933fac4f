-- Effects without an outcome, who settles them, and reports of other systems.
select plan(19);

insert into bridge.inbox (worker, event_id, effects, started_at, ended_at, finished_at) values
  ('pay', '00000000-0000-0000-0000-000000000001', '{"charge": {"idempotency_key": "k1", "started_at": "2026-01-01T10:00Z", "given": {"amount": 1}}}', now(), now(), null),
  ('pay', '00000000-0000-0000-0000-000000000002', '{"charge": {"idempotency_key": "k2", "started_at": "2026-01-01T09:00Z"}}', now(), null, null),
  ('pay', '00000000-0000-0000-0000-000000000003', '{"charge": {"idempotency_key": "k3", "started_at": "2026-01-01T09:00Z", "result": {}}}', now(), null, null),
  ('pay', '00000000-0000-0000-0000-000000000004', '{"charge": {"idempotency_key": "k4", "started_at": "2026-01-01T09:00Z"}}', now(), null, now()),
  ('pay', '00000000-0000-0000-0000-000000000005', '{"charge": {"idempotency_key": "k5", "started_at": "2026-01-01T09:00Z"}}', now() - interval '8 days', null, null),
  ('other', '00000000-0000-0000-0000-000000000001', '{"charge": {"idempotency_key": "k6", "started_at": "2026-01-01T09:00Z"}}', now(), null, null);

select results_eq($$ select key, operation, given, state from bridge.open_effects('pay', now() - interval '7 days') $$,
  $$ values ('k2', 'charge', null::jsonb, 'waiting'), ('k1', 'charge', '{"amount": 1}', 'dead') $$,
  'open effects: of this worker, recent, unfinished, without a result; the oldest first');
select ok((select bool_and(age > 3600) from bridge.open_effects('pay', now() - interval '7 days')), 'with their age in seconds');

select throws_ok($$ select bridge.settle_effect('pay', '00000000-0000-0000-0000-000000000001', 'k1', '7') $$, '22023', null, 'an outcome is an object');
select ok(not bridge.settle_effect('pay', '00000000-0000-0000-0000-000000000001', 'k2', '{}'), 'a key of another event is not settled');
select ok(bridge.settle_effect('pay', '00000000-0000-0000-0000-000000000001', 'k1', '{"paid": true}', 'ann@desk'), 'one that is open is');
select ok(not bridge.settle_effect('pay', '00000000-0000-0000-0000-000000000001', 'k1', '{}'), 'once');
select is((select effects #> '{charge,result}' from bridge.inbox where worker = 'pay' and event_id = '00000000-0000-0000-0000-000000000001'),
  '{"paid": true}', 'the outcome is the result that its handler finds');
select results_eq($$ select letter, action, person, why from bridge.dead_letter_audit $$,
  $$ values ('pay:00000000-0000-0000-0000-000000000001', 'settled', 'ann@desk', 'k1: {"paid": true}') $$, 'who said so is on record');
select ok(bridge.settle_effect('pay', '00000000-0000-0000-0000-000000000002', 'k2', null), 'null says that it never happened');
select is((select effects #- '{charge,refused}' from bridge.inbox where worker = 'pay' and event_id = '00000000-0000-0000-0000-000000000002'),
  '{"charge": {"idempotency_key": "pay:00000000-0000-0000-0000-000000000002:charge:2"}}', 'it has a fresh key, and has not begun');
select is_empty($$ select from bridge.open_effects('pay', now() - interval '7 days') $$, 'nothing is open any more');
select ok(not bridge.settle_effect('pay', '00000000-0000-0000-0000-000000000002', 'pay:00000000-0000-0000-0000-000000000002:charge:2', '{}'),
  'what has not begun cannot be settled');

insert into bridge.inbox (worker, event_id, effects, started_at, ended_at, finished_at) values
  ('old', '00000000-0000-0000-0000-000000000001', '{"charge": {"idempotency_key": "k", "started_at": "2026-01-01T09:00Z"}}', '2026-01-01', '2026-01-01', null),
  ('old', '00000000-0000-0000-0000-000000000002', '{"charge": {"idempotency_key": "k", "started_at": "2026-01-01T09:00Z", "result": {}}}', '2026-01-01', '2026-01-01', null),
  ('old', '00000000-0000-0000-0000-000000000003', '{"charge": {"idempotency_key": "k", "started_at": "2026-01-01T09:00Z", "result": {}}}', '2026-01-01', null, '2026-01-01'),
  ('old', '00000000-0000-0000-0000-000000000004', '{}', '2026-01-01', '2026-01-01', null);
select is(bridge.inbox_prune('old', now()), 2, 'what was finished is pruned, and what began nothing');
select results_eq($$ select right(event_id::text, 1) from bridge.inbox where worker = 'old' order by 1 $$,
  $$ values ('1'), ('2') $$, 'what was given up after it had begun something outside never is');

select isnt(bridge.receive_notice('pay', 'evt_1', 'stripe.payment_intent.succeeded', '{"id":  "evt_1"}', 'pi_1'), null, 'a report becomes an event');
select is(bridge.receive_notice('pay', 'evt_1', 'stripe.payment_intent.succeeded', '{"id":  "evt_1"}', 'pi_1'), null, 'once');
select isnt(bridge.receive_notice('other', 'evt_1', 'stripe.payment_intent.succeeded', '{}', 'pi_1'), null, 'for each who listens');
select results_eq($$ select topic, key, payload from bridge.emitted() where payload <> '{}' $$,
  $$ values ('stripe.payment_intent.succeeded', 'pi_1', '{"id":  "evt_1"}') $$, 'with its text as it came');
select is(bridge.prune_notices('pay', now() + interval '1 day') + bridge.prune_notices('pay', now() + interval '1 day'), 1, 'old ones are pruned');
