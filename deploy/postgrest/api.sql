-- An API of PostgREST whose requests become events: support tickets that their owners open, read and close over HTTP.
-- docs/postgrest.md follows one request. As a superuser, since roles are made, after `pgbridge migrate`:
--
--   psql -v ON_ERROR_STOP=1 -d shop -f deploy/postgrest/api.sql
--
--   POST /tickets {"title": "..."}             support.ticket.opened
--   POST /rpc/close_ticket {"ticket": 1}       support.ticket.closed
--
-- Each event says who did it (actor: the token's sub and role) and in which trace (traceparent: the request's header).

begin;

-- Roles ---------------------------------------------------------------------------------------------------------------
-- PostgREST connects as `authenticator`, which may do nothing but become one of the others, for one request.

do $$
begin
  if not exists (select from pg_roles where rolname = 'anonymous') then
    create role anonymous nologin; -- requests without a token
  end if;
  if not exists (select from pg_roles where rolname = 'authenticated') then
    create role authenticated nologin; -- tokens with "role": "authenticated"
  end if;
  if not exists (select from pg_roles where rolname = 'authenticator') then
    create role authenticator login noinherit; -- then: \password authenticator
  end if;
  if not exists (select from pg_roles where rolname = 'support_emitter') then
    create role support_emitter nologin in role bridge_emitter; -- owns what emits, and nobody is it
  end if;
end
$$;
grant anonymous, authenticated to authenticator;

-- What clients see: everything in `api`, so nothing else may be in it -----------------------------------------------------

create schema support;
create schema api;
grant usage on schema api to anonymous, authenticated;
grant usage on schema support to authenticated;

create function support.subject() returns text
  language sql stable
  return nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub';
comment on function support.subject() is 'Whose request this is, as the verified token says; null without one.';

create table api.tickets (
  id        bigint generated always as identity primary key,
  opened_by text not null default support.subject(),
  opened_at timestamptz not null default now(),
  title     text not null check (length(title) between 1 and 200),
  state     text not null default 'open' check (state in ('open', 'closed'))
);
create index on api.tickets (opened_by);

-- Who is behind a token sees and changes what is theirs. The columns that nobody may choose are in no grant.
alter table api.tickets enable row level security;
create policy own on api.tickets to authenticated
  using (opened_by = (select support.subject())) with check (opened_by = (select support.subject()));
grant select, insert (title), update (state) on api.tickets to authenticated;

-- VOLATILE, as functions are by default, so that it is called with POST: PostgREST runs a GET in a transaction that may
-- not write, and an event is written.
create function api.close_ticket(ticket bigint) returns api.tickets
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  closed api.tickets;
begin
  update api.tickets as t set state = 'closed' where t.id = ticket returning * into closed;
  if not found then
    -- PostgREST makes a status of such a code: 404.
    raise exception 'you have no ticket %', ticket using errcode = 'PT404';
  end if;
  return closed;
end
$$;
revoke execute on function api.close_ticket(bigint) from public;
grant execute on function api.close_ticket(bigint) to authenticated;

-- Events --------------------------------------------------------------------------------------------------------------
-- SECURITY DEFINER, so that no role of a client is in bridge_emitter: they emit what this trigger says, and nothing else.
-- Actor and trace come from PostgREST's settings, whoever the function runs as.

create function support.announce_ticket() returns trigger
  language plpgsql security definer
  set search_path = pg_catalog, pg_temp
as $$
begin
  perform bridge.emit(
    case when tg_op = 'INSERT' then 'support.ticket.opened' else 'support.ticket.closed' end,
    jsonb_build_object('ticket', new.id, 'title', new.title),
    key => new.id::text
  );
  return null;
end
$$;
alter function support.announce_ticket() owner to support_emitter;
revoke execute on function support.announce_ticket() from public;

create trigger announce_opened after insert on api.tickets
  for each row execute function support.announce_ticket();
create trigger announce_closed after update of state on api.tickets
  for each row when (old.state = 'open' and new.state = 'closed') execute function support.announce_ticket();

commit;
