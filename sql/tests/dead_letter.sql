-- bridge.dead_letter keeps one letter for an event, a bridge and a sink.
select plan(4);
create function pg_temp.letter(sink text) returns bigint language sql as $$
  with stored as (
    insert into bridge.dead_letter (bridge, event_id, sequence, topic, payload, content_type, headers, created_at, sink, code, reason, attempts)
    values ('b', '11111111-1111-1111-1111-111111111111', 1, 't', 'p', 'text/plain', '{}', now(), sink, 'unroutable', 'r', 1)
    on conflict (bridge, event_id, coalesce(sink, '')) do nothing returning 1)
  select count(*) from stored $$;
select is(pg_temp.letter('events'), 1::bigint, 'a first letter is kept');
select is(pg_temp.letter('events'), 0::bigint, 'a second one of the same sink is not');
select is(pg_temp.letter(null), 1::bigint, 'an event without route is another letter');
select is(pg_temp.letter(null), 0::bigint, 'once');
select * from finish();
