-- oldest program: 0024
-- Who paused what, and who let it go on: a pause that has ended left nothing behind.

create table bridge.pause_audit (
  id     bigint generated always as identity primary key,
  kind   text not null check (kind in ('sink', 'worker')),
  bridge text not null,
  name   text not null,
  action text not null check (action in ('paused', 'resumed')),
  person text not null,
  role   text not null default session_user,
  why    text not null default '',
  at     timestamptz not null default clock_timestamp()
);
comment on table bridge.pause_audit is 'Each pause of a sink or a worker, and its end, with who did it.';

-- False where it was paused before; that pause stays as it is.
create or replace function bridge.set_pause(pause_kind text, bridge_name text, pause_name text, person text, reason text)
  returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  insert into bridge.pause (kind, bridge, name, who, why)
  values (pause_kind, bridge_name, pause_name, person, reason) on conflict do nothing;
  if not found then
    return false;
  end if;
  insert into bridge.pause_audit (kind, bridge, name, action, person, why)
  values (pause_kind, bridge_name, pause_name, 'paused', person, reason);
  -- A bridge that leads looks at once; one that does not hear it looks with its next sign of life.
  perform pg_notify('bridge_pause', bridge_name);
  return true;
end
$$;

create function bridge.end_pause(pause_kind text, bridge_name text, pause_name text, person text)
  returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  delete from bridge.pause p where p.kind = pause_kind and p.bridge = bridge_name and p.name = pause_name;
  if not found then
    return false;
  end if;
  insert into bridge.pause_audit (kind, bridge, name, action, person)
  values (pause_kind, bridge_name, pause_name, 'resumed', end_pause.person);
  perform pg_notify('bridge_pause', bridge_name);
  return true;
end
$$;
comment on function bridge.end_pause(text, text, text, text) is
  'Lets a paused sink or worker go on; the person is written down. False: it was not paused.';

-- Programs before this migration ask so, and do not say who they are.
create or replace function bridge.end_pause(pause_kind text, bridge_name text, pause_name text)
  returns boolean
  language sql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select bridge.end_pause(pause_kind, bridge_name, pause_name, session_user::text)
$$;
