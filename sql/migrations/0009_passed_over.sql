-- What a reader does not take costs it as little as can be: its rows come as one array of ids, not as a row each.
-- And the ids of held events come as an array, which a client writes ten times faster than a multirange.

drop function bridge.read_page(bigint, int8multirange, int, bigint, text[], boolean);
drop function bridge.store_cursor(text, text, bigint, int8multirange, int8multirange);

-- Which topics some patterns take, in the form that takes() tests. Nearly every pattern is plain words with a # at the
-- end or none: LIKE tests those, in a sixth of the time of a regular expression, which is for the others.
create function bridge.topic_test(patterns text[], out likes text[], out regex text)
language sql immutable parallel safe
set search_path = pg_catalog, bridge, pg_temp
as $$
    select coalesce(array_agg(l.likes) filter (where p.is_plain), '{}'),
           bridge.topic_regex(array_agg(distinct p.pattern) filter (where not p.is_plain))
    from (
             select q.pattern, q.pattern !~ '(^|\.)(\*|#\.)' as is_plain,
                    regexp_replace(q.pattern, '([\\%_])', '\\\1', 'g') as escaped
             from unnest(patterns) as q (pattern)
         ) as p,
         lateral (
             select p.escaped as likes where p.escaped !~ '(^|\.)#$'
             union all select '%' where p.escaped = '#'
             union all select unnest(array[left(p.escaped, -2), left(p.escaped, -1) || '%']) where p.escaped ~ '\.#$'
         ) as l
$$;

create function bridge.takes(topic text, likes text[], regex text) returns boolean
language sql immutable parallel safe
return topic like any (likes) or coalesce(('.' || topic) ~ regex, false);

-- The ids of the next rows above the mark, by whether a reader takes them; null where there are none.
-- Planner: as for read_page().
create function bridge.split_page(
    mark bigint, room int, likes text[], regex text, inverted boolean, out taken bigint[], out passed bigint[])
language plpgsql stable
set search_path = pg_catalog, bridge, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
begin
    select array_agg(r.id) filter (where r.is_taken), array_agg(r.id) filter (where not r.is_taken)
    into taken, passed
    from (
        select n.id, bridge.takes(n.topic, split_page.likes, split_page.regex) <> inverted as is_taken
        from bridge.outbox n where n.id > split_page.mark order by n.id limit room
    ) r;
end $$;

-- One page: late rows first (those in the gaps), then the rows above the mark, in id order. The reader takes the topics
-- that `patterns` take (null: all), or with `inverted` all others. The last row is no event: its `passed` are the ids
-- that were seen and not taken, and its id is the xmin of the very snapshot that looked (STABLE: all queries share it),
-- or 0, below every transaction, when there was no room to look into every gap.
-- Planner: estimates on a log that grows by thousands a second are always stale; only the primary key may serve.
create function bridge.read_page(
    mark bigint, gaps int8multirange, page_size int, page_bytes bigint, patterns text[], inverted boolean)
returns table (
    id bigint, event_id text, topic text, key text, payload bytea, content_type text, headers text,
    created_at timestamptz, passed bigint[]
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
    takes_all constant boolean := patterns is null;
    test constant record := bridge.topic_test(patterns);
    passed_late bigint[] := '{}';
    taken_ids bigint[];
    passed_ids bigint[];
    returned bigint := 0;
begin
    -- unnest() gives the gaps in ascending order and a lateral join keeps it. A sort by id would say so formally,
    -- but would fetch every late row of a bulk transaction for each page.
    for late in
        select o.*
        from unnest(gaps) as gap,
             lateral (select * from bridge.outbox n where n.id >= lower(gap) and n.id < upper(gap)
                      order by n.id limit room) as o
    loop
        id := late.id;
        if takes_all or bridge.takes(late.topic, test.likes, test.regex) <> inverted then
            event_id := late.event_id::text; topic := late.topic; key := late.key;
            payload := convert_to(late.payload, 'UTF8'); content_type := late.content_type;
            headers := bridge.header_texts(late.headers);
            created_at := bridge.calendar_time(late.created_at);
            bytes_room := bytes_room - bridge.event_bytes(late.payload, late.key, late.headers);
            return next;
        else
            passed_late := passed_late || late.id;
        end if;
        room := room - 1;
        if room <= 0 or bytes_room <= 0 then
            -- There may be more in the gaps: none of them can be closed by this look.
            return query select 0::bigint, null::text, null::text, null::text, null::bytea, null::text, null::text,
                                null::timestamptz, passed_late;
            return;
        end if;
    end loop;

    if inverted then
        -- It takes next to nothing, which is seen without making rows.
        select s.* into taken_ids, passed_ids
        from bridge.split_page(mark, room, test.likes, test.regex, inverted) as s;
    end if;
    if not inverted or taken_ids is not null then
        return query
            select o.id, o.event_id::text, o.topic, o.key, convert_to(o.payload, 'UTF8'), o.content_type,
                   bridge.header_texts(o.headers), bridge.calendar_time(o.created_at), null::bigint[]
            from (
                select m.*, sum(m.size) over (order by m.id rows unbounded preceding) - m.size as bytes_before
                from (
                    select r.*, bridge.event_bytes(r.payload, r.key, r.headers) as size
                    from (select * from bridge.outbox n where n.id > read_page.mark order by n.id limit room) r
                    where takes_all or bridge.takes(r.topic, test.likes, test.regex) <> inverted
                ) m
            ) o
            where o.bytes_before < bytes_room order by o.id;
        get diagnostics returned = row_count;
    end if;
    if returned < room and not takes_all then
        if not inverted then
            select s.* into taken_ids, passed_ids
            from bridge.split_page(mark, room, test.likes, test.regex, inverted) as s;
        end if;
        if returned < cardinality(taken_ids) then
            -- It was the bytes that did not suffice: what comes behind the last row is left to the next page.
            passed_ids := array(select p from unnest(passed_ids) as p where p < taken_ids[returned + 1]);
        end if;
    end if;
    return query select pg_snapshot_xmin(pg_current_snapshot())::text::bigint, null::text, null::text, null::text,
                        null::bytea, null::text, null::text, null::timestamptz, passed_late || passed_ids;
end $$;

-- Everything up to this position is settled, but for the ids that are held (null: those stored before). The horizon,
-- this transaction's id, was taken after every page that led to these gaps was read, so it may close them. No row:
-- somebody removed the position.
create function bridge.store_cursor(
    bridge_name text, sink_name text, settled_mark bigint, settled_gaps int8multirange, now_held bigint[])
returns bigint
language sql
set search_path = pg_catalog, bridge, pg_temp
as $$
    update bridge.cursor
    set mark = settled_mark, gaps = settled_gaps, horizon = pg_current_xact_id(), stored_at = clock_timestamp(),
        held = case when now_held is null then held else (
            select coalesce(range_agg(int8range(i, i + 1)), '{}') from unnest(now_held) as i) end
    where name = bridge_name and sink = sink_name
    returning horizon::text::bigint
$$;
