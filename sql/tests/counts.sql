-- bridge.status(n) and bridge.worker_status(workers, n): what lies beyond n events is reckoned, and said to be.
select plan(10);

truncate bridge.outbox, bridge.cursor, bridge.inbox, bridge.held; -- of the event that was committed before
insert into bridge.cursor (name, sink, mark, held, horizon, system_identifier, patterns) values
  ('b', 'all', 10, '{[1,6)}', '3', 1, '{#}'), ('b', 'half', 20, '{}', '3', 1, '{even.#}'), ('b', 'near', 55, '{}', '3', 1, '{#}'),
  ('b', 'none', 0, '{}', '3', 1, '{none.#}');
insert into bridge.outbox (id, topic, payload, content_type, created_at)
select n, case n % 2 when 0 then 'even' else 'odd' end, '', 'text/plain', now() - interval '1 hour' + n * interval '1 second'
from generate_series(1, 60) n;

select results_eq('select sink, backlog, backlog_exact from bridge.status()',
  $$ values ('all', 55::bigint, true), ('half', 20, true), ('near', 5, true), ('none', 0, true) $$, 'all is counted where it can be');
select results_eq('select sink, backlog, backlog_exact from bridge.status(8)',
  $$ values ('all', 55::bigint, false), ('half', 20, false), ('near', 5, true), ('none', 0, false) $$,
  'a longer backlog is reckoned, for what a sink takes, and says so');
select results_eq('select sink, backlog, backlog_exact from bridge.status(4)',
  $$ values ('all', 55::bigint, false), ('half', 20, false), ('near', 5, false), ('none', 0, false) $$,
  'held events are as many as they are, counted or not');
select results_eq('select sink, now() - oldest_unsent_at from bridge.status(4)',
  $$ values ('all', interval '3599 seconds'), ('half', interval '3578 seconds'), ('near', interval '3544 seconds'), ('none', null) $$,
  'the oldest is the oldest');

insert into bridge.inbox (worker, event_id, started_at, finished_at)
select 'w' || n % 2, gen_random_uuid(), now() - n * interval '1 second', case when n % 4 > 1 then now() end from generate_series(1, 40) n;
insert into bridge.held (worker, event_id, key)
select 'w' || n % 2, gen_random_uuid(), 'key ' || n from generate_series(1, 6) n;

select results_eq($$ select worker, waiting, finished_last_hour, held_keys, is_exact from bridge.worker_status('{w0,other}') $$,
  $$ values ('other', 0::bigint, 0::bigint, 0::bigint, true), ('w0', 10, 10, 3, true), ('w1', 10, 10, 3, true) $$,
  'of the workers that are named, and of those that have an inbox');
select results_eq($$ select worker, waiting, finished_last_hour, held_keys, is_exact from bridge.worker_status('{}', 20) $$,
  $$ values ('w0', 5::bigint, 5::bigint, 3::bigint, false), ('w1', 5, 5, 3, false) $$, 'of the events begun last');
select results_eq($$ select worker, held_keys, is_exact from bridge.worker_status('{}', 6) $$,
  $$ values ('w0', 3::bigint, false), ('w1', 3, false) $$, 'held keys are counted as far');
select results_eq($$ select worker, waiting, finished_last_hour from bridge.worker_status('{}', 41) $$,
  $$ values ('w0', 10::bigint, 10::bigint), ('w1', 10, 10) $$, 'and whoever looks further sees all');
select ok((select bool_and(is_exact) from bridge.worker_status('{}', 41)), 'which it says');

-- However long ago: what was given up, or waits for another attempt.
insert into bridge.inbox (worker, event_id, started_at, due_at, failure, ended_at)
select 'w0', gen_random_uuid(), now() - interval '2 days', case when n < 3 then now() end, case when n = 3 then '{}'::jsonb end,
       case when n = 4 then now() end
from generate_series(1, 4) n;
select results_eq($$ select worker, waiting, dead_letters from bridge.worker_status('{}', 6) $$,
  $$ values ('w0', 3::bigint, 2::bigint), ('w1', 2, 0) $$, 'what was begun before the events that are counted, and is not at its end');
