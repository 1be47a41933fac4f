-- How often a worker's handlers begin, over all its processes: for somebody else's API that takes so many calls a second.

create table bridge.rates (
    worker  text        primary key,
    last_at timestamptz not null       -- the latest start that was handed out; it may lie ahead
);

comment on table bridge.rates is
    'When the handlers of workers with a rate begin; by the clock of the database, since those of processes differ.';

-- Hands out up to `wanted` starts of a worker, evenly spaced over all that ask, `per_second` a second. Returns a row for
-- each that is wanted: `reserved` starts are the caller's, in `seconds` from now; for the others ask again in `seconds`.
-- Reserved is only what lies within `horizon` seconds: more than that is not lost with a process that dies, however slow
-- the rate and however many ask.
--
-- Time in which nobody asked earns nothing, so there is no burst: a window of a second has never more starts than a second
-- may have, at its beginning as little as later. The last start is kept and not the next one, so that another rate
-- holds from the first call that brings it.
create function bridge.rate_take(
    worker_name text, wanted integer, per_second double precision, horizon double precision)
returns table (seconds double precision, reserved boolean)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    -- Rounded up to what a timestamp can hold: three thirds of a second must not fit into one.
    step constant interval := make_interval(secs => ceil(1e6 / per_second) / 1e6);
    ahead constant interval := make_interval(secs => horizon);
    moment timestamptz;
    latest timestamptz;
    coming timestamptz;
begin
    -- Else each start would wait for the disk. A crash of the server forgets what was handed out shortly before (0.6 s at
    -- the defaults); an unlogged table would forget all, and two would begin in an hour that may have one.
    perform set_config('synchronous_commit', 'off', true);
    select r.last_at into latest from bridge.rates r where r.worker = worker_name for no key update;
    if not found then
        insert into bridge.rates (worker, last_at) values (worker_name, '-infinity') on conflict do nothing;
        select r.last_at into latest from bridge.rates r where r.worker = worker_name for no key update;
    end if;
    -- The time at which the row is ours, however long others had it.
    moment := clock_timestamp();
    -- Nobody reserves beyond the horizon. What lies there was reserved by a clock that has gone back since, as after a
    -- failover, and is nothing to wait for.
    latest := least(latest, moment + ahead);
    coming := greatest(moment, latest + step);
    for n in 1 .. wanted loop
        reserved := coming <= moment + ahead;
        seconds := extract(epoch from coming - moment);
        if reserved then
            latest := coming;
            coming := coming + step;
        else
            -- At the moment when the next one can be reserved, so that those who wait get it, and not whoever comes by
            -- first in a process that is quicker; at high rates when several can, so that few queries bring many.
            seconds := greatest(seconds - horizon, 0.02);
        end if;
        return next;
    end loop;
    update bridge.rates r set last_at = latest where r.worker = worker_name and r.last_at <> latest;
end $$;

comment on function bridge.rate_take(text, integer, double precision, double precision) is
    'Reserves starts of a worker with a rate; returns the seconds until each, or until it is worth to ask again.';
