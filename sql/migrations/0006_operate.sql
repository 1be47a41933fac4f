-- What operators do: see how things stand, replay and discard dead letters with an audit, prune the log.

create table bridge.dead_letter_audit (
  id       bigint generated always as identity primary key,
  letter   text not null,
  action   text not null check (action in ('replayed', 'discarded')),
  event_id uuid,
  topic    text,
  code     text,
  failure  text,
  why      text not null default '',
  person   text not null,
  role     text not null default session_user,
  at       timestamptz not null default clock_timestamp()
);
comment on table bridge.dead_letter_audit is
  'Which dead letters were taken away, by whom and why. Without payloads, and never pruned.';
comment on column bridge.dead_letter_audit.letter is 'outbox:<id>, or <worker>:<event id> for one of a queue.';
comment on column bridge.dead_letter_audit.person is 'Who gave the command, as the operating system knows them: user@host.';
comment on column bridge.dead_letter_audit.role is 'The database role of the session that gave it.';

-- Takes letters away and writes down who did; one transaction, so neither stands without the other.
create function bridge.end_dead_letters(letters bigint[], action text, person text, why text) returns bigint
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  ended bigint;
begin
  with gone as (
    delete from bridge.dead_letter d where d.id = any (letters)
    returning d.id, d.event_id, d.topic, d.code, d.reason
  )
  insert into bridge.dead_letter_audit (letter, action, event_id, topic, code, failure, why, person)
    select 'outbox:' || g.id, end_dead_letters.action, g.event_id, g.topic, g.code, g.reason,
           end_dead_letters.why, end_dead_letters.person
    from gone g order by g.id;
  get diagnostics ended = row_count;
  return ended;
end
$$;
comment on function bridge.end_dead_letters(bigint[], text, text, text) is
  'Removes dead letters that were published after all (replayed) or given up (discarded); returns how many.';

create function bridge.refuse_dead_letter(letter bigint, refused_code text, refused_reason text, more_attempts int)
  returns void
  language sql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  update bridge.dead_letter
  set code = refused_code, reason = refused_reason, attempts = attempts + more_attempts, failed_at = clock_timestamp()
  where id = letter
$$;
comment on function bridge.refuse_dead_letter(bigint, text, text, int) is
  'A replay was refused too: the letter stays, with the newest reason.';

-- Letters of the workers' queues leave on the broker, so this only writes down who took them away.
create function bridge.audit_dead_letter(
  letter text, action text, event_id uuid, topic text, code text, failure text, person text, why text) returns void
  language sql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  insert into bridge.dead_letter_audit (letter, action, event_id, topic, code, failure, person, why)
  values (audit_dead_letter.letter, audit_dead_letter.action, audit_dead_letter.event_id, audit_dead_letter.topic,
          audit_dead_letter.code, audit_dead_letter.failure, audit_dead_letter.person, audit_dead_letter.why)
$$;

-- Deletes the settled and old ones among the first `chunk` events above `after`, and says where to go on: below the
-- first event that stayed. Settled means at or below the mark of every bridge, and in no gap where a row may still
-- appear late. It looks at `chunk` rows at most, never for old ones beyond young ones: ids and times rise together.
create function bridge.prune(before timestamptz, chunk int, after bigint, out deleted bigint, out next_after bigint)
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  old bigint[];
  first_kept bigint;
  last_seen bigint;
begin
  select array_agg(seen.id) filter (where seen.done), min(seen.id) filter (where not seen.done), max(seen.id)
  into old, first_kept, last_seen
  from (
    select o.id,
           o.created_at < before
           and exists (select from bridge.cursor)
           and not exists (select from bridge.cursor c where o.id > c.mark or o.id <@ c.gaps) as done
    from (select n.id, n.created_at from bridge.outbox n where n.id > after order by n.id limit chunk) o
  ) seen;
  delete from bridge.outbox o where o.id = any (old);
  get diagnostics deleted = row_count;
  -- A row that commits late into a gap must still be found by a later call.
  next_after := least(coalesce(first_kept - 1, last_seen, after), (select min(lower(c.gaps)) - 1 from bridge.cursor c));
end
$$;
comment on function bridge.prune(timestamptz, int, bigint) is
  'Deletes a chunk of events that every bridge has settled and that were recorded before a time.';

-- Where the log comes to a time: the lowest id whose event, and all that follow, were recorded at or after it, as far
-- as ids and times rise together. Twenty-odd looks into the primary key in place of a scan.
create function bridge.position_at(moment timestamptz) returns bigint
  language plpgsql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  low bigint := (select min(id) from bridge.outbox);
  high bigint := (select max(id) + 1 from bridge.outbox);
  middle bigint;
  found_id bigint;
  found_at timestamptz;
begin
  while low < high loop
    middle := low + (high - low) / 2;
    select o.id, o.created_at into found_id, found_at from bridge.outbox o where o.id >= middle order by o.id limit 1;
    if not found or found_at >= moment then
      high := middle;
    else
      low := found_id + 1;
    end if;
  end loop;
  return coalesce(low, 0);
end
$$;

-- How far each bridge is. Events not settled are counted up to a bound, so that a look at a backlog of millions stays
-- cheap; beyond it `backlog` is the distance of ids, which rolled back transactions make a little too large.
create function bridge.status()
  returns table (
    name text, leader text, leader_since timestamptz, leads boolean, mark bigint, last_id bigint, gaps bigint,
    backlog bigint, backlog_exact boolean, oldest_unsent_at timestamptz, stored_at timestamptz, asleep boolean,
    dead_letters bigint
  )
  language plpgsql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off
  set enable_bitmapscan = off
  set enable_sort = off
as $$
declare
  bound constant int := 100000;
  c record;
  late bigint;
  late_at timestamptz;
begin
  last_id := coalesce((select max(o.id) from bridge.outbox o), 0);
  for c in select * from bridge.cursor cu order by cu.name loop
    name := c.name; mark := c.mark; stored_at := c.stored_at;
    gaps := (select coalesce(sum(upper(g) - lower(g)), 0) from unnest(c.gaps) g);
    -- The row says who led last; only the lock says whether that session lives.
    leads := exists (
      select from pg_locks l
      where l.locktype = 'advisory' and l.granted and l.objsubid = 1
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
        and (l.classid::bigint << 32) + l.objid::bigint = bridge.lead_key(c.name));
    leader := case when leads then c.leader end;
    leader_since := case when leads then c.leader_since end;
    asleep := coalesce((select b.asleep from bridge.bell b where b.name = c.name), true);

    select count(*), min(n.created_at) into late, late_at
      from unnest(c.gaps) g,
           lateral (select o.created_at from bridge.outbox o where o.id >= lower(g) and o.id < upper(g)
                    order by o.id limit bound) n;
    backlog := late + (select count(*) from (select from bridge.outbox o where o.id > c.mark limit bound) n);
    backlog_exact := backlog < bound;
    if not backlog_exact then
      backlog := greatest(backlog, last_id - c.mark + late);
    end if;
    oldest_unsent_at := least(late_at, (select n.created_at from (
      select o.created_at from bridge.outbox o where o.id > c.mark order by o.id limit 1) n));
    dead_letters := (select count(*) from bridge.dead_letter d where d.bridge = c.name);
    return next;
  end loop;
end
$$;
comment on function bridge.status() is 'One row a bridge: who leads, how far it is, and what waits.';

-- What in the database endangers the log. Other sessions' start times are seen only by pg_read_all_stats, which the
-- owner of this schema may have or not: hence sees_sessions.
create function bridge.guards(
  out notification_queue_usage double precision, out oldest_transaction_at timestamptz,
  out oldest_transaction text, out sees_sessions boolean, out outbox_bytes bigint, out oldest_event_at timestamptz)
  language sql stable security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select pg_notification_queue_usage(), holder.since, holder.who,
         pg_has_role('pg_read_all_stats', 'usage'),
         pg_total_relation_size('bridge.outbox'),
         (select o.created_at from bridge.outbox o order by o.id limit 1)
  from (values (1)) one
  left join lateral (
    select * from (
      select a.xact_start as since,
             format('pid %s, role %s, database %s, %s', a.pid, a.usename, a.datname, a.state) as who
      from pg_stat_activity a
      where a.pid <> pg_backend_pid() and (a.backend_xid is not null or a.backend_xmin is not null)
        and a.backend_type <> 'autovacuum worker' and a.xact_start is not null
      union all
      select p.prepared, format('prepared transaction %L, role %s, database %s', p.gid, p.owner, p.database)
      from pg_prepared_xacts p
    ) every order by since limit 1
  ) holder on true
$$;
comment on function bridge.guards() is
  'The oldest transaction or snapshot (it stops vacuum and keeps gaps open), NOTIFY''s queue, and the size of the log.';
