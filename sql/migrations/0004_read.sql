-- Reading the log: a mark and its gaps, one leader a name, and the bell.
-- The rules and their reasons: ARCHITECTURE.md, "Reading the log". bridge/sources/outbox.py is the caller.

-- One page: late rows first (those in the gaps), then the rows above the mark, in id order.
-- The first row is no event: its id is the xmin of the very snapshot that looked (STABLE: all queries share it).
-- Planner: estimates on a log that grows by thousands a second are always stale; only the primary key may serve.
create function bridge.read_page(mark bigint, gaps int8multirange, page_size int, page_bytes bigint)
returns table (
    id bigint, event_id text, topic text, key text, payload bytea, content_type text, headers text,
    created_at timestamptz
)
language plpgsql stable
set search_path = pg_catalog, bridge, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
declare
    late record;
    room int := page_size;
    bytes_room bigint := page_bytes;
begin
    id := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    return next;

    -- unnest() gives the gaps in ascending order and a lateral join keeps it. A sort by id would say so formally,
    -- but would fetch every late row of a bulk transaction for each page.
    for late in
        select o.*, octet_length(o.payload) as size
        from unnest(gaps) as gap,
             lateral (select * from bridge.outbox n where n.id >= lower(gap) and n.id < upper(gap)
                      order by n.id limit room) as o
    loop
        id := late.id; event_id := late.event_id::text; topic := late.topic; key := late.key;
        payload := convert_to(late.payload, 'UTF8'); content_type := late.content_type;
        headers := nullif(late.headers, '{}')::text; created_at := late.created_at;
        return next;
        room := room - 1;
        bytes_room := bytes_room - late.size;
        if room <= 0 or bytes_room <= 0 then
            return;
        end if;
    end loop;

    return query
        select o.id, o.event_id::text, o.topic, o.key, convert_to(o.payload, 'UTF8'), o.content_type,
               nullif(o.headers, '{}')::text, o.created_at
        from (
            select n.*, sum(octet_length(n.payload)) over (order by n.id rows unbounded preceding)
                        - octet_length(n.payload) as bytes_before
            from bridge.outbox n where n.id > read_page.mark order by n.id limit room
        ) o
        where o.bytes_before < bytes_room order by o.id;
end $$;

-- Tries to become the one that reads for this name. Never blocks: a lock call that waits would hold a snapshot
-- and stop vacuum. Gives no row while another session leads; otherwise where to go on.
create function bridge.take_lead(bridge_name text, who text)
returns table (mark bigint, gaps int8multirange, horizon bigint)
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
declare
    cluster bigint := (select system_identifier from pg_control_system());
begin
    if not pg_try_advisory_lock(bridge.lead_key(bridge_name)) then
        return;
    end if;
    -- Ids and horizons mean nothing in another cluster (dump and restore, pg_upgrade): the gaps stay, and
    -- wait for a horizon of this one.
    insert into bridge.cursor as c (name, horizon, system_identifier, leader, leader_since)
    values (bridge_name, pg_current_xact_id(), cluster, who, now())
    on conflict (name) do update set
        horizon = case when c.system_identifier = cluster then c.horizon else pg_current_xact_id() end,
        system_identifier = cluster, leader = who, leader_since = now();
    insert into bridge.bell (name, asleep) values (bridge_name, true)
    on conflict (name) do update set asleep = true;
    return query select c.mark, c.gaps, c.horizon::text::bigint from bridge.cursor c where c.name = bridge_name;
end $$;

create function bridge.lead_key(bridge_name text) returns bigint
language sql immutable parallel safe
set search_path = pg_catalog, bridge, pg_temp
as $$ select hashtextextended('pgbridge lead ' || bridge_name, 0) $$;

-- Hands the lead over at once: a standby listens for it.
create function bridge.leave_lead(bridge_name text) returns void
language plpgsql
set search_path = pg_catalog, bridge, pg_temp
as $$
begin
    update bridge.cursor set leader = null, leader_since = null where name = bridge_name;
    -- Asleep, so that whoever leads next is rung for while it starts.
    update bridge.bell set asleep = true where name = bridge_name and not asleep;
    perform pg_advisory_unlock(bridge.lead_key(bridge_name));
    perform pg_notify('bridge_lead', bridge_name);
end $$;

-- Everything up to this position is settled. The horizon, this transaction's id, was taken after every page that
-- led to these gaps was read, so it may close them.
create function bridge.store_cursor(bridge_name text, settled_mark bigint, settled_gaps int8multirange)
returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$
    update bridge.cursor
    set mark = settled_mark, gaps = settled_gaps, horizon = pg_current_xact_id(), stored_at = clock_timestamp()
    where name = bridge_name
    returning horizon::text::bigint
$$;

-- A horizon, when there is nothing to store. The assigned id makes no write that a commit would wait for.
create function bridge.take_horizon() returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$ select pg_current_xact_id()::text::bigint $$;

create function bridge.set_asleep(bridge_name text, sleeps boolean) returns void
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$ update bridge.bell set asleep = sleeps where name = bridge_name and asleep <> sleeps $$;
