-- Outgoing webhooks: who wants which topics, what is to be sent to each, and what became of it. A worker whose reply is
-- webhook_fan_out() stores each event once and a delivery for each endpoint that wants it; `pgbridge-worker deliver` claims
-- what is due, posts it, and records what came.
--
-- Locks: whoever changes deliveries that are not finished holds the row of their endpoint, several in the order of their
-- ids. Only claims skip rows that are locked, so nobody waits for a ring of others.

create table bridge.webhook_endpoint (
    id            bigint           primary key generated always as identity,
    url           text             not null,
    topics        text[]           not null,
    likes         text[]           not null, -- the topics as takes() tests them
    regex         text,
    description   text             not null default '',
    concurrency   integer          not null default 4,
    rate          double precision,
    created_at    timestamptz      not null default clock_timestamp(),
    disabled_at   timestamptz,
    disabled_why  text,
    failures      integer          not null default 0,
    opened        integer          not null default 0,
    open_until    timestamptz,
    paused_until  timestamptz,
    next_start_at timestamptz,
    failing_since timestamptz,
    apart         integer          not null default 0,
    last_apart_at timestamptz,
    last_success_at timestamptz
) with (fillfactor = 50); -- No column that changes often is in an index: updates stay in the page.

comment on table bridge.webhook_endpoint is 'Where webhooks go; changed only through functions, as add_endpoint().';
comment on column bridge.webhook_endpoint.concurrency is 'Most requests to it at once, over all processes.';
comment on column bridge.webhook_endpoint.rate is 'Most requests a second, over all processes; null: no limit.';
comment on column bridge.webhook_endpoint.failures is 'Attempts that failed in a row, of whichever delivery.';
comment on column bridge.webhook_endpoint.opened is 'How often in a row the circuit breaker has opened.';
comment on column bridge.webhook_endpoint.open_until is
    'Null while the circuit breaker is closed; until then nothing is sent, and after it one delivery at a time.';
comment on column bridge.webhook_endpoint.paused_until is 'Until when the endpoint asked not to be sent anything (Retry-After).';
comment on column bridge.webhook_endpoint.next_start_at is 'With a rate: when the next request may begin.';
comment on column bridge.webhook_endpoint.failing_since is 'The first failure since the last success.';
comment on column bridge.webhook_endpoint.apart is 'Failures since then that lay an hour or more apart; last_apart_at is the last.';

-- Apart from the endpoints, so that whoever may look at those need not see how to sign for them.
create table bridge.webhook_secret (
    endpoint   bigint      not null references bridge.webhook_endpoint on delete cascade,
    secret     text        not null,
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    primary key (endpoint, secret)
);

comment on table bridge.webhook_secret is
    'What signs; one without an end for each endpoint, and those before it until they expire. For nobody to read.';

create table bridge.webhook_message (
    event_id   uuid        primary key,
    topic      text        not null,
    key        text,
    event_time timestamptz not null,
    body       text        not null,
    size       integer     not null generated always as (octet_length(body)) stored,
    created_at timestamptz not null default clock_timestamp()
);

create index webhook_message_created on bridge.webhook_message (created_at);

comment on table bridge.webhook_message is 'The body of each event that some endpoint wants, as it is signed and posted.';

create table bridge.webhook_delivery (
    id          bigint      primary key generated always as identity,
    endpoint    bigint      not null references bridge.webhook_endpoint on delete cascade,
    event_id    uuid        not null references bridge.webhook_message,
    state       text        not null check (state in ('due', 'sending', 'done', 'failed', 'skipped')),
    attempts    integer     not null default 0,
    failures    integer     not null default 0,
    due_at      timestamptz,
    sent_at     timestamptz,
    last_status integer,
    last_error  text,
    created_at  timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    unique (event_id, endpoint), -- the event first: by it messages without deliveries are found
    check ((due_at is null) = (state in ('done', 'failed', 'skipped'))),
    check ((finished_at is null) = (state in ('due', 'sending')))
);

-- Every other index is for some states only, and no two of them for the same: what is due is found whatever the history,
-- and no plan can take the index of the history for it.
create index webhook_delivery_due on bridge.webhook_delivery (endpoint, due_at, id) where state = 'due';
create index webhook_delivery_sending on bridge.webhook_delivery (endpoint, due_at, id) where state = 'sending';
create index webhook_delivery_done on bridge.webhook_delivery (endpoint, finished_at, id) where state = 'done';
create index webhook_delivery_failed on bridge.webhook_delivery (endpoint, finished_at, id) where state = 'failed';
create index webhook_delivery_skipped on bridge.webhook_delivery (endpoint, finished_at, id) where state = 'skipped';

comment on table bridge.webhook_delivery is
    'A message on its way to an endpoint: due, sending, done, failed (no further attempt), or skipped (the endpoint was '
    'disabled). Id and attempts together are the token of a claim.';
comment on column bridge.webhook_delivery.attempts is 'Requests that were begun, also those of processes that died.';
comment on column bridge.webhook_delivery.failures is 'Attempts that failed since it was made due: its place in the schedule.';
comment on column bridge.webhook_delivery.due_at is
    'When it is to be sent; while it is sent: when the claim ends, and it is due again.';

create table bridge.webhook_attempt (
    delivery bigint           not null references bridge.webhook_delivery on delete cascade,
    number   integer          not null,
    at       timestamptz      not null,
    status   integer,
    duration double precision,
    error    text             not null,
    answer   text             not null,
    primary key (delivery, number)
);

comment on table bridge.webhook_attempt is
    'What came of each request; the answer''s beginning as text. Without a duration: its process never said.';

-- Whether this is the name of a host, or an address as URLs have it. A last label that is a number makes an address of the
-- whole, and what some programs read in other forms of those is no business of ours.
create function bridge.is_host(host text) returns boolean
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
begin
    if host ~ '^\[.*\]$' then
        return host ~ '^\[[0-9a-fA-F:.]+\]$' and family(substring(host from 2 for length(host) - 2)::inet) = 6;
    elsif host ~ '(^|\.)(\d+|0[xX][0-9a-fA-F]*)\.?$' then
        return host ~ '^((0|[1-9]\d{0,2})\.){3}(0|[1-9]\d{0,2})$' and host::inet is not null;
    end if;
    return length(host) <= 253 and host ~ '^([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.(?!$)|\.?$))+$';
exception when data_exception then
    return false;
end $$;

-- Raises what is wrong with an address. Whether it may be connected to is looked at when that is done: a name may lead
-- somewhere else by then.
create function bridge.check_webhook_url(url text) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
declare
    shown constant text := left(url, 80);
    authority constant text := substring(url from '^https?://([^/?#]*)');
begin
    if url is null then
        raise exception 'the URL of a webhook is null'
            using errcode = 'null_value_not_allowed', hint = 'Give one such as https://example.com/hooks.';
    elsif octet_length(url) > 2048 then
        raise exception 'the URL of a webhook has % bytes; 2048 are allowed', octet_length(url)
            using errcode = 'invalid_parameter_value', hint = 'What the receiver must know goes into the payload.';
    elsif authority is null then
        raise exception 'the URL of a webhook does not begin with https:// or http://: %', shown
            using errcode = 'invalid_parameter_value', hint = 'It looks like https://example.com/hooks.';
    elsif authority ~ '@' then
        -- It is not repeated: what stands there is a secret.
        raise exception 'the URL of a webhook has a user or a password in it'
            using errcode = 'invalid_parameter_value',
                  hint = 'Leave them out: the receiver knows us by the signature.';
    elsif url ~ '#' then
        raise exception 'the URL of a webhook has a fragment, which is never sent: %', shown
            using errcode = 'invalid_parameter_value', hint = 'Leave out the # and what is behind it, or write %23.';
    elsif url !~ '^[!-~]*$' or url ~ '\\' then
        raise exception 'the URL of a webhook has a backslash in it, or what is not visible ASCII: %', shown
            using errcode = 'invalid_parameter_value',
                  hint = 'Percent-encode them, and write the name of a host as it is in DNS (xn--...).';
    elsif not bridge.is_host(regexp_replace(authority, ':\d{1,5}$', '')) then
        raise exception 'the URL of a webhook has no proper host: %', shown
            using errcode = 'invalid_parameter_value',
                  hint = 'Write a name or an address, [..] around that of IPv6, and a port if it is not the usual one.';
    elsif substring(authority from ':(\d+)$')::int not between 1 and 65535 then
        raise exception 'the URL of a webhook has a port that does not exist: %', shown
            using errcode = 'invalid_parameter_value', hint = 'Ports are 1 to 65535.';
    end if;
end $$;

-- Raises what is wrong with patterns of topics: what the settings refuse in `subscribe`.
create function bridge.check_topic_patterns(patterns text[]) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
declare
    pattern text;
    word text;
begin
    if coalesce(cardinality(patterns), 0) = 0 then
        raise exception 'an endpoint without topics would get nothing'
            using errcode = 'invalid_parameter_value', hint = 'Give patterns such as {shop.order.*}; {#} takes all.';
    end if;
    foreach pattern in array patterns loop
        if pattern is null or pattern = '' then
            raise exception 'a pattern of topics is empty'
                using errcode = 'invalid_parameter_value', hint = 'Give dotted words, such as shop.order.*; # takes all.';
        elsif octet_length(pattern) > 255 then
            raise exception 'a pattern of topics has % bytes; topics and patterns have up to 255', octet_length(pattern)
                using errcode = 'invalid_parameter_value', hint = 'Use * for one word, and # for any number of words.';
        end if;
        foreach word in array string_to_array(pattern, '.') loop
            if word = '>' then
                raise exception 'in the pattern %: > is no wildcard', quote_literal(pattern)
                    using errcode = 'invalid_parameter_value', hint = 'Write # for any number of words.';
            elsif length(word) > 1 and word ~ '[*#]' then
                raise exception 'in the pattern %: * and # stand for whole words between dots, and not for a part of one',
                    quote_literal(pattern)
                    using errcode = 'invalid_parameter_value', hint = 'Write shop.*.placed, or shop.#.';
            end if;
        end loop;
    end loop;
end $$;

create function bridge.check_webhook_limits(concurrency integer, rate double precision) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
begin
    if concurrency not between 1 and 1000 then
        raise exception 'the concurrency of an endpoint is %, and not between 1 and 1000', concurrency
            using errcode = 'invalid_parameter_value', hint = 'It is the most requests to the endpoint at once; 4 is usual.';
    -- NaN is greater than every number.
    elsif not (rate > 0 and (rate <= 1000000 or rate = 'infinity')) then
        raise exception 'the rate of an endpoint is %, and not more than 0 and at most a million a second', rate
            using errcode = 'invalid_parameter_value',
                  hint = 'It is in requests a second: 0.5 is one every two seconds. Leave it out for no limit.';
    end if;
end $$;

-- Raises where a secret is none of Standard Webhooks: whsec_ for HMAC, whsk_ for ed25519. It is never repeated.
create function bridge.check_webhook_secret(secret text) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
declare
    bytes integer;
begin
    if secret !~ '^(whsec|whsk)_([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$' then
        raise exception 'the secret is not of the form whsec_<base64> or whsk_<base64>'
            using errcode = 'invalid_parameter_value', hint = 'Leave it out, and one is made.';
    end if;
    bytes := octet_length(decode(substring(secret from '_(.*)'), 'base64'));
    if secret like 'whsec\_%' and bytes not between 24 and 64 then
        raise exception 'the secret has % bytes; 24 to 64 are allowed behind whsec_', bytes
            using errcode = 'invalid_parameter_value', hint = 'Leave it out, and one of 32 bytes is made.';
    elsif secret like 'whsk\_%' and bytes not in (32, 64) then
        raise exception 'the private key has % bytes; ed25519 has 32 (or 64 with the public one) behind whsk_', bytes
            using errcode = 'invalid_parameter_value', hint = 'pgbridge-worker webhooks add --asymmetric makes a pair.';
    end if;
end $$;

-- Three UUIDs have 366 bits from the server's strong random numbers.
create function bridge.make_webhook_secret() returns text
language sql volatile set search_path = pg_catalog, bridge, pg_temp as $$
    select 'whsec_' || encode(sha256(
        uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64')
$$;

create function bridge.no_such_endpoint(endpoint bigint) returns void
language plpgsql immutable set search_path = pg_catalog, bridge, pg_temp as $$
begin
    raise exception 'there is no endpoint %', coalesce(endpoint::text, 'null')
        using errcode = 'no_data_found', hint = 'See the table bridge.webhook_endpoint, or: pgbridge-worker webhooks list';
end $$;

create function bridge.add_endpoint(
    url text, topics text[], description text default '', concurrency integer default 4, rate double precision default null,
    secret text default null)
returns table (endpoint bigint, signing_secret text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    test record;
begin
    perform bridge.check_webhook_url(url);
    perform bridge.check_topic_patterns(topics);
    perform bridge.check_webhook_limits(concurrency, rate);
    perform bridge.check_webhook_secret(secret);
    test := bridge.topic_test(topics);
    insert into bridge.webhook_endpoint (url, topics, likes, regex, description, concurrency, rate)
    values (add_endpoint.url, add_endpoint.topics, test.likes, test.regex, coalesce(add_endpoint.description, ''),
            coalesce(add_endpoint.concurrency, 4), nullif(add_endpoint.rate, 'infinity'))
    returning id into endpoint;
    signing_secret := coalesce(secret, bridge.make_webhook_secret());
    insert into bridge.webhook_secret (endpoint, secret) values (add_endpoint.endpoint, signing_secret);
    return next;
end $$;

comment on function bridge.add_endpoint(text, text[], text, integer, double precision, text) is
    'Sends webhooks to a URL from now on. Returns the endpoint''s id, and the secret for its receiver, shown only here.';

-- Null leaves a field as it is; the rate 'infinity' is none.
create function bridge.change_endpoint(
    endpoint bigint, url text default null, topics text[] default null, description text default null,
    concurrency integer default null, rate double precision default null)
returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    test record;
    other boolean;
begin
    if url is not null then
        perform bridge.check_webhook_url(url);
    end if;
    if topics is not null then
        perform bridge.check_topic_patterns(topics);
    end if;
    perform bridge.check_webhook_limits(concurrency, rate);
    test := bridge.topic_test(topics);
    select e.url <> change_endpoint.url into other from bridge.webhook_endpoint e where e.id = endpoint
    for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
    update bridge.webhook_endpoint e set
        url = coalesce(change_endpoint.url, e.url),
        topics = coalesce(change_endpoint.topics, e.topics),
        likes = case when change_endpoint.topics is null then e.likes else test.likes end,
        regex = case when change_endpoint.topics is null then e.regex else test.regex end,
        description = coalesce(change_endpoint.description, e.description),
        concurrency = coalesce(change_endpoint.concurrency, e.concurrency),
        rate = nullif(coalesce(change_endpoint.rate, e.rate), 'infinity'),
        next_start_at = case when change_endpoint.rate is null then e.next_start_at end
    where e.id = endpoint;
    if other then
        -- What is known of the old address says nothing of the new one.
        perform bridge.webhook_forget_trouble(endpoint);
    end if;
end $$;

comment on function bridge.change_endpoint(bigint, text, text[], text, integer, double precision) is
    'Changes where an endpoint is, what it gets and how fast. Null leaves a field as it is; the rate infinity is none.';

create function bridge.webhook_forget_trouble(endpoint bigint) returns void
language sql volatile set search_path = pg_catalog, bridge, pg_temp as $$
    update bridge.webhook_endpoint e set failures = 0, opened = 0, open_until = null, paused_until = null,
        failing_since = null, apart = 0, last_apart_at = null
    where e.id = webhook_forget_trouble.endpoint
$$;

create function bridge.rotate_secret(endpoint bigint, grace interval default '24 hours', secret text default null)
returns text
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    made text;
begin
    if grace is null or grace < interval '0' then
        raise exception 'the time for which the old secret signs, too, is negative or null'
            using errcode = 'invalid_parameter_value', hint = 'Give one such as 24 hours; 0 ends it at once.';
    end if;
    perform bridge.check_webhook_secret(secret);
    perform from bridge.webhook_endpoint e where e.id = endpoint for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
    if secret is null and exists (
        select from bridge.webhook_secret s
        where s.endpoint = rotate_secret.endpoint and s.expires_at is null and s.secret like 'whsk\_%') then
        raise exception 'the endpoint % signs with a key pair, and SQL cannot make one', endpoint
            using errcode = 'invalid_parameter_value',
                  hint = 'Give the private key, or: pgbridge-worker webhooks rotate ENDPOINT --asymmetric';
    end if;
    made := coalesce(secret, bridge.make_webhook_secret());
    if exists (select from bridge.webhook_secret s where s.endpoint = rotate_secret.endpoint and s.secret = made) then
        raise exception 'the endpoint % has this secret already', endpoint
            using errcode = 'invalid_parameter_value', hint = 'Give another one, or leave it out, and one is made.';
    end if;
    delete from bridge.webhook_secret s
    where s.endpoint = rotate_secret.endpoint
      and (grace = interval '0' or s.expires_at <= clock_timestamp());
    update bridge.webhook_secret s set expires_at = least(s.expires_at, clock_timestamp() + grace)
    where s.endpoint = rotate_secret.endpoint;
    insert into bridge.webhook_secret (endpoint, secret) values (rotate_secret.endpoint, made);
    return made;
end $$;

comment on function bridge.rotate_secret(bigint, interval, text) is
    'Gives an endpoint a new secret, and returns it. For the grace time the old one signs as well.';

-- At most `most` (null: all) of what is due at an endpoint that is disabled.
create function bridge.webhook_skip(endpoint bigint, most integer) returns bigint
language plpgsql set search_path = pg_catalog, bridge, pg_temp as $$
declare
    skipped bigint;
begin
    update bridge.webhook_delivery d set state = 'skipped', due_at = null, finished_at = clock_timestamp()
    where d.id in (
        (select w.id from bridge.webhook_delivery w where w.state = 'due' and w.endpoint = webhook_skip.endpoint
         order by w.due_at, w.id limit most)
        union all
        (select w.id from bridge.webhook_delivery w where w.state = 'sending' and w.endpoint = webhook_skip.endpoint
             and w.due_at <= clock_timestamp()
         order by w.due_at, w.id limit most));
    get diagnostics skipped = row_count;
    return skipped;
end $$;

create function bridge.webhook_disabled(endpoint bigint, url text, why text, since timestamptz) returns void
language plpgsql set search_path = pg_catalog, bridge, pg_temp as $$
begin
    perform bridge.emit(
        'bridge.webhook.disabled',
        jsonb_build_object('endpoint', endpoint, 'url', url, 'why', why, 'since', since),
        'webhook:' || endpoint);
end $$;

create function bridge.disable_endpoint(endpoint bigint, why text default '') returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    old bridge.webhook_endpoint;
begin
    select e.* into old from bridge.webhook_endpoint e where e.id = endpoint for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    elsif old.disabled_at is not null then
        return false;
    end if;
    update bridge.webhook_endpoint e
    set disabled_at = clock_timestamp(), disabled_why = coalesce(nullif(why, ''), 'by hand') where e.id = endpoint;
    perform bridge.webhook_disabled(endpoint, old.url, coalesce(nullif(why, ''), 'by hand'), clock_timestamp());
    perform bridge.webhook_skip(endpoint, null);
    return true;
end $$;

comment on function bridge.disable_endpoint(bigint, text) is
    'Sends an endpoint nothing more: what is due is skipped, as is what comes. False where it was disabled already.';

create function bridge.enable_endpoint(endpoint bigint) returns boolean
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    was_disabled boolean;
begin
    select e.disabled_at is not null into was_disabled from bridge.webhook_endpoint e where e.id = endpoint
    for no key update;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
    update bridge.webhook_endpoint e set disabled_at = null, disabled_why = null where e.id = endpoint;
    perform bridge.webhook_forget_trouble(endpoint);
    return was_disabled;
end $$;

comment on function bridge.enable_endpoint(bigint) is
    'Sends an endpoint what comes from now on, and closes its circuit breaker; recover_endpoint() also sends what it missed.';

create function bridge.recover_endpoint(endpoint bigint, since timestamptz) returns bigint
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    recovered bigint;
begin
    if since is null then
        raise exception 'since when the endpoint is to get what it missed is null'
            using errcode = 'null_value_not_allowed', hint = 'Give a time, such as now() - interval ''2 days''.';
    end if;
    perform bridge.enable_endpoint(endpoint);
    update bridge.webhook_delivery d
    set state = 'due', due_at = clock_timestamp(), finished_at = null, failures = 0
    where d.id in (
        select w.id from bridge.webhook_delivery w
        where w.endpoint = recover_endpoint.endpoint and w.state = 'failed' and w.finished_at >= since
        union all
        select w.id from bridge.webhook_delivery w
        where w.endpoint = recover_endpoint.endpoint and w.state = 'skipped' and w.finished_at >= since);
    get diagnostics recovered = row_count;
    return recovered;
end $$;

comment on function bridge.recover_endpoint(bigint, timestamptz) is
    'Enables an endpoint, and makes due again what failed for good or was skipped since then; returns how many those are.';

create function bridge.resend_delivery(delivery bigint) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    its_endpoint bigint;
    disabled_since timestamptz;
    old bridge.webhook_delivery;
begin
    select d.endpoint into its_endpoint from bridge.webhook_delivery d where d.id = delivery;
    if found then
        select e.disabled_at into disabled_since from bridge.webhook_endpoint e where e.id = its_endpoint
        for no key update;
    end if;
    select d.* into old from bridge.webhook_delivery d where d.id = delivery;
    if not found then
        raise exception 'there is no delivery %', coalesce(delivery::text, 'null')
            using errcode = 'no_data_found',
                  hint = 'It may be past the retention. See: pgbridge-worker webhooks show ENDPOINT';
    elsif disabled_since is not null then
        raise exception 'the endpoint % of the delivery % is disabled', its_endpoint, delivery
            using errcode = 'object_not_in_prerequisite_state', hint = 'Enable it first: pgbridge-worker webhooks enable ENDPOINT';
    elsif old.state = 'sending' and old.due_at > clock_timestamp() then
        raise exception 'the delivery % is being sent', delivery
            using errcode = 'object_in_use', hint = 'Wait for what comes of that.';
    end if;
    update bridge.webhook_delivery d set state = 'due', due_at = clock_timestamp(), finished_at = null, failures = 0
    where d.id = delivery;
end $$;

comment on function bridge.resend_delivery(bigint) is
    'Makes a delivery due now, whatever became of it, with its whole schedule of attempts before it.';

create function bridge.remove_endpoint(endpoint bigint) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    delete from bridge.webhook_endpoint e where e.id = endpoint;
    if not found then
        perform bridge.no_such_endpoint(endpoint);
    end if;
end $$;

comment on function bridge.remove_endpoint(bigint) is
    'Forgets an endpoint, its secrets, its deliveries and their attempts.';

-- Stores an event's message, {"topic", "key", "time", "body"}, and a delivery for each endpoint that wants it: at once due,
-- or skipped where the endpoint is disabled, so that it can be recovered. A second call for an event changes nothing.
create function bridge.webhook_fan_out(event uuid, result jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp as $$
declare
    its_topic constant text := result ->> 'topic';
    moment constant timestamptz := clock_timestamp();
    wanting bigint[];
    disabled bigint[];
begin
    if its_topic is null or result ->> 'body' is null then
        raise exception 'the result of the event % is not what workers.webhooks:fan_out returns', event
            using errcode = 'invalid_parameter_value',
                  hint = 'bridge.webhook_fan_out takes {"topic", "key", "time", "body"}, all of them texts.';
    end if;
    -- Locked as the foreign key would, so that one that is removed meanwhile is passed over.
    select array_agg(l.id), array_agg(l.id) filter (where l.disabled_at is not null) into wanting, disabled
    from (select e.id, e.disabled_at from bridge.webhook_endpoint e where bridge.takes(its_topic, e.likes, e.regex)
          order by e.id for key share) l;
    if wanting is null then
        return;
    end if;
    insert into bridge.webhook_message (event_id, topic, key, event_time, body)
    values (event, its_topic, result ->> 'key', coalesce((result ->> 'time')::timestamptz, moment), result ->> 'body')
    on conflict do nothing;
    insert into bridge.webhook_delivery (endpoint, event_id, state, due_at, finished_at)
    select w.id, event,
           case when w.id = any (disabled) then 'skipped' else 'due' end,
           case when w.id = any (disabled) then null else moment end,
           case when w.id = any (disabled) then moment end
    from unnest(wanting) as w (id)
    on conflict do nothing;
end $$;

comment on function bridge.webhook_fan_out(uuid, jsonb) is
    'The reply function of workers.webhooks:fan_out: a delivery for each endpoint that wants the topic.';

-- Endpoints that have something to be sent, now or later: when that may begin, and how many requests more they may have.
-- It steps from endpoint to endpoint, so it costs what the endpoints are and not what waits for them.
create function bridge.webhook_waiting(moment timestamptz)
returns table (endpoint bigint, disabled boolean, due_at timestamptz, starts_at timestamptz, in_flight integer, free integer)
language sql stable set search_path = pg_catalog, bridge, pg_temp as $$
    with recursive heads as (
        (select d.endpoint, d.due_at from bridge.webhook_delivery d where d.state = 'due'
         order by d.endpoint, d.due_at, d.id limit 1)
        union all
        select following.endpoint, following.due_at from heads h cross join lateral (
            select d.endpoint, d.due_at from bridge.webhook_delivery d
            where d.state = 'due' and d.endpoint > h.endpoint order by d.endpoint, d.due_at, d.id limit 1) as following
    ), claimed as (
        select d.endpoint, min(d.due_at) as due_at, count(*) filter (where d.due_at > moment) as in_flight
        from bridge.webhook_delivery d where d.state = 'sending' group by d.endpoint
    )
    select e.id, e.disabled_at is not null, least(h.due_at, c.due_at),
           greatest(least(h.due_at, c.due_at), e.open_until, e.paused_until,
                    -- A clock that went back, as after a failover, is nothing to wait for.
                    case when e.next_start_at is not null
                        then least(e.next_start_at, moment + make_interval(secs => 1 / e.rate)) end),
           coalesce(c.in_flight, 0)::integer,
           (case when e.open_until is null then e.concurrency else 1 end - coalesce(c.in_flight, 0))::integer
    from heads h full join claimed c using (endpoint) join bridge.webhook_endpoint e on e.id = endpoint
$$;

-- Claims at most `room` deliveries that are due, of about `bytes_room` bytes, for `lease` seconds: what has no outcome by
-- then is due again, but not for the process that still has it `in_hand`, as after an outage. Each endpoint has at most its concurrency in flight, over all processes, and one probe after its
-- circuit breaker was open. Where more is due than there is room, the next request goes to whoever has the fewest.
create function bridge.webhook_claim(room integer, bytes_room bigint, lease double precision, in_hand bigint[])
returns table (
    delivery bigint, attempt integer, event uuid, endpoint bigint, url text, secrets text[], body text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
    burst constant interval := interval '0.2 seconds'; -- what a rate earns while nobody looks
    moment timestamptz := clock_timestamp();
    bytes_left bigint := bytes_room;
    candidate record;
    e bridge.webhook_endpoint;
    free integer;
    step interval;
    start timestamptz;
    chosen bigint[];
    lost bigint[];
    taken bigint;
begin
    -- Else each claim would wait for the disk. One that a crash forgets is made again, as after any crash.
    perform set_config('synchronous_commit', 'off', true);
    for candidate in
        select slots.endpoint, bool_or(slots.disabled) as disabled, count(*)::integer as quota
        from (
            select w.endpoint, w.disabled, w.due_at, w.in_flight + n as place
            from bridge.webhook_waiting(moment) w
            cross join lateral (
                select count(*) as due from (
                    (select 1 from bridge.webhook_delivery d where d.state = 'due' and d.endpoint = w.endpoint
                         and d.due_at <= moment
                     order by d.due_at, d.id limit greatest(w.free, 1))
                    union all
                    (select 1 from bridge.webhook_delivery d where d.state = 'sending' and d.endpoint = w.endpoint
                         and d.due_at <= moment and d.id <> all (webhook_claim.in_hand)
                     order by d.due_at, d.id limit greatest(w.free, 1))) as each
            ) as found
            cross join lateral generate_series(1, case when w.disabled then 1 else least(w.free, found.due)::integer end) as n
            where w.starts_at <= moment or w.disabled
            order by place, w.due_at limit room
        ) as slots
        group by slots.endpoint
        order by min(slots.place), min(slots.due_at)
    loop
        exit when bytes_left <= 0;
        select w.* into e from bridge.webhook_endpoint w where w.id = candidate.endpoint for no key update skip locked;
        continue when not found;
        if e.disabled_at is not null then
            -- Whoever disabled it could not see what was being stored at that moment, or left some for its number.
            perform bridge.webhook_skip(e.id, 1000);
            continue;
        end if;
        -- The time at which the row is ours, and what is in flight by then.
        moment := clock_timestamp();
        continue when greatest(e.open_until, e.paused_until) > moment;
        select least(candidate.quota, case when e.open_until is null then e.concurrency else 1 end - count(*)) into free
        from bridge.webhook_delivery d where d.state = 'sending' and d.endpoint = e.id and d.due_at > moment;
        if e.rate is not null then
            step := make_interval(secs => ceil(1e6 / e.rate) / 1e6);
            start := moment - burst;
            if e.next_start_at is not null then
                start := greatest(start, least(e.next_start_at, moment + step));
            end if;
            free := least(free, case when start > moment then 0
                else floor(extract(epoch from moment - start) / extract(epoch from step)) + 1 end);
        end if;
        continue when free <= 0;

        select array_agg(c.id order by c.due_at, c.id), array_agg(c.id) filter (where c.state = 'sending'), sum(c.size)
        into chosen, lost, taken
        from (
            select due.id, due.state, due.due_at, m.size, sum(m.size) over (order by due.due_at, due.id) - m.size as bytes_before
            from (
                (select d.id, d.state, d.due_at, d.event_id from bridge.webhook_delivery d
                 where d.state = 'sending' and d.endpoint = e.id and d.due_at <= moment
                     and d.id <> all (webhook_claim.in_hand)
                 order by d.due_at, d.id limit free)
                union all
                (select d.id, d.state, d.due_at, d.event_id from bridge.webhook_delivery d
                 where d.state = 'due' and d.endpoint = e.id and d.due_at <= moment
                 order by d.due_at, d.id limit free)
                order by due_at, id limit free
            ) as due
            join bridge.webhook_message m on m.event_id = due.event_id
        ) as c
        where c.bytes_before < bytes_left;
        continue when chosen is null;
        bytes_left := bytes_left - taken;

        insert into bridge.webhook_attempt (delivery, number, at, error, answer)
        select d.id, d.attempts, d.sent_at, 'the process that sent it did not say what came of it', ''
        from bridge.webhook_delivery d where d.id = any (lost);
        update bridge.webhook_delivery d set state = 'sending', attempts = d.attempts + 1, sent_at = moment,
            due_at = moment + make_interval(secs => lease)
        where d.id = any (chosen);
        if e.rate is not null then
            update bridge.webhook_endpoint w set next_start_at = start + cardinality(chosen) * step where w.id = e.id;
        end if;
        return query
            select d.id, d.attempts, d.event_id, e.id, e.url,
                   (select array_agg(s.secret order by s.created_at desc) from bridge.webhook_secret s
                    where s.endpoint = e.id and (s.expires_at is null or s.expires_at > moment)),
                   m.body
            from unnest(chosen) with ordinality as c (id, place)
            join bridge.webhook_delivery d on d.id = c.id
            join bridge.webhook_message m on m.event_id = d.event_id
            order by c.place;
    end loop;
end $$;

comment on function bridge.webhook_claim(integer, bigint, double precision, bigint[]) is
    'Claims deliveries that are due for one process; (delivery, attempt) is the token with which it records the outcome.';

-- Seconds until something is due that may be sent; null where nothing waits. What waits only for a request to end, which
-- may be another process's, has no time.
create function bridge.webhook_next() returns double precision
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
    moment constant timestamptz := clock_timestamp();
begin
    return (
        select case when min(w.starts_at) is not null then greatest(0, extract(epoch from min(w.starts_at) - moment)) end
        from bridge.webhook_waiting(moment) w where w.free > 0 and not w.disabled);
end $$;

-- Records what came of deliveries that were claimed. `schedule` are the seconds from each failed attempt to the next; after
-- the last one there is none. `retry_afters` are the seconds for which an endpoint asked. Returns for each
--   done      delivered
--   due       it will be sent again
--   failed    it will not
--   skipped   it will not, since its endpoint was disabled
--   repeated  this outcome is on record already
--   late      the claim was lost, and another one is or was made: this outcome counts for nothing
-- and, where this outcome did that to its endpoint, for how many seconds the circuit breaker opened, and why the endpoint
-- was disabled.
create function bridge.webhook_record(
    deliveries bigint[], attempts integer[], statuses integer[], durations double precision[], errors text[],
    answers text[], retry_afters double precision[], schedule double precision[])
returns table (delivery bigint, state text, endpoint bigint, opened double precision, disabled text)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
declare
    most_failures constant integer := 5; -- in a row, until the circuit breaker opens
    first_opening constant double precision := 10;
    longest_opening constant double precision := 900;
    longest_pause constant double precision := 86400;
    failing_for constant interval := interval '5 days'; -- until an endpoint is disabled that never succeeds,
    least_apart constant integer := 5; -- after so many failures
    apart_by constant interval := interval '1 hour'; -- which lie so far apart
    throttled constant integer[] := array[429, 502, 503, 504];
    moment timestamptz;
    e bridge.webhook_endpoint;
    d bridge.webhook_delivery;
    n integer;
    pause interval;
    succeeded boolean;
begin
    for e in
        select w.* from bridge.webhook_endpoint w
        where w.id in (select g.endpoint from bridge.webhook_delivery g where g.id = any (deliveries))
        order by w.id for no key update
    loop
        moment := clock_timestamp();
        for n in
            select o.place from unnest(deliveries) with ordinality as o (id, place)
            join bridge.webhook_delivery g on g.id = o.id where g.endpoint = e.id order by o.place
        loop
            delivery := deliveries[n];
            endpoint := e.id;
            opened := null;
            disabled := null;
            select g.* into d from bridge.webhook_delivery g where g.id = delivery;
            if d.state is distinct from 'sending' or d.attempts <> attempts[n] then
                state := case when exists (
                    select from bridge.webhook_attempt a
                    where a.delivery = deliveries[n] and a.number = attempts[n] and a.duration is not null)
                    then 'repeated' else 'late' end;
                return next;
                continue;
            end if;
            insert into bridge.webhook_attempt (delivery, number, at, status, duration, error, answer)
            values (d.id, attempts[n], d.sent_at, statuses[n], durations[n], errors[n], answers[n]);
            succeeded := statuses[n] between 200 and 299;
            pause := case when retry_afters[n] is not null
                then make_interval(secs => least(greatest(retry_afters[n], 0), longest_pause)) end;
            if succeeded then
                e.last_success_at := moment;
                e.failures := 0;
                e.opened := 0;
                e.open_until := null;
                e.failing_since := null;
                e.apart := 0;
                e.last_apart_at := null;
            else
                e.failures := e.failures + 1;
                if e.failing_since is null then
                    e.failing_since := moment;
                end if;
                if e.last_apart_at is null or e.last_apart_at <= moment - apart_by then
                    e.apart := e.apart + 1;
                    e.last_apart_at := moment;
                end if;
                -- What was on the way when it opened says nothing new.
                if (case when e.open_until is null then e.failures >= most_failures else e.open_until <= moment end) then
                    opened := least(first_opening * 2.0 ^ least(e.opened, 20), longest_opening);
                    e.opened := e.opened + 1;
                    e.open_until := moment + make_interval(secs => opened);
                end if;
                if pause is not null and statuses[n] = any (throttled) then
                    e.paused_until := greatest(e.paused_until, moment + pause);
                end if;
                if e.disabled_at is null then
                    disabled := case
                        when statuses[n] = 410 then 'it answered 410 Gone'
                        when e.failing_since <= moment - failing_for and e.apart >= least_apart
                            then 'nothing has succeeded since ' || to_char(e.failing_since at time zone 'UTC', 'YYYY-MM-DD HH24:MI "UTC"')
                        end;
                end if;
            end if;

            d.failures := d.failures + 1;
            state := case
                when succeeded then 'done'
                when statuses[n] = 410 or d.failures > cardinality(schedule) then 'failed'
                when disabled is not null or e.disabled_at is not null then 'skipped'
                else 'due'
            end;
            update bridge.webhook_delivery g set
                state = webhook_record.state,
                failures = case when succeeded then g.failures else d.failures end,
                due_at = case when webhook_record.state = 'due' then greatest(
                    moment + make_interval(secs => schedule[d.failures] * (0.9 + 0.2 * random())), moment + pause) end,
                finished_at = case when webhook_record.state <> 'due' then moment end,
                last_status = statuses[n],
                last_error = errors[n]
            where g.id = d.id;
            if disabled is not null then
                e.disabled_at := moment;
                e.disabled_why := disabled;
                perform bridge.webhook_disabled(e.id, e.url, disabled, e.failing_since);
                -- The rest is left to claims, or everybody in this transaction would wait for it.
                perform bridge.webhook_skip(e.id, 1000);
            end if;
            return next;
        end loop;
        update bridge.webhook_endpoint w set
            disabled_at = e.disabled_at, disabled_why = e.disabled_why, failures = e.failures, opened = e.opened,
            open_until = e.open_until, paused_until = e.paused_until, failing_since = e.failing_since, apart = e.apart,
            last_apart_at = e.last_apart_at, last_success_at = e.last_success_at
        where w.id = e.id;
    end loop;
    -- Those of endpoints that were removed.
    return query
        select o.id, 'late', null::bigint, null::double precision, null::text from unnest(deliveries) as o (id)
        where not exists (select from bridge.webhook_delivery g where g.id = o.id);
end $$;

comment on function bridge.webhook_record(
    bigint[], integer[], integer[], double precision[], text[], text[], double precision[], double precision[]) is
    'Records what came of claimed deliveries: delivered, when to try again, the circuit breaker, and the end of endpoints.';

-- How much waits to be sent, and how many circuit breakers are not closed: for metrics.
create function bridge.webhook_backlog(out due bigint, out open_breakers bigint)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    select (select count(*) from bridge.webhook_delivery d where d.state = 'due'),
           (select count(*) from bridge.webhook_endpoint e where e.open_until is not null and e.disabled_at is null)
$$;

-- Deletes at most `chunk` deliveries that were finished before `before`, and as many messages of which nothing is left; says
-- how many those were. What is still to be sent stays.
create function bridge.webhook_prune(before timestamptz, chunk integer, out deliveries bigint, out messages bigint)
language plpgsql security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
begin
    delete from bridge.webhook_delivery d using (
        select o.id from bridge.webhook_endpoint e
        cross join lateral (
            (select n.id from bridge.webhook_delivery n where n.state = 'done' and n.endpoint = e.id
                 and n.finished_at < before
             order by n.finished_at, n.id limit chunk)
            union all
            (select n.id from bridge.webhook_delivery n where n.state = 'failed' and n.endpoint = e.id
                 and n.finished_at < before
             order by n.finished_at, n.id limit chunk)
            union all
            (select n.id from bridge.webhook_delivery n where n.state = 'skipped' and n.endpoint = e.id
                 and n.finished_at < before
             order by n.finished_at, n.id limit chunk)) as o
        limit chunk) as old
    where d.id = old.id and d.state in ('done', 'failed', 'skipped');
    get diagnostics deliveries = row_count;
    delete from bridge.webhook_message m using (
        select o.event_id from bridge.webhook_message o
        where o.created_at < before
          and not exists (select from bridge.webhook_delivery d where d.event_id = o.event_id)
        order by o.created_at limit chunk for update skip locked) as old
    where m.event_id = old.event_id;
    get diagnostics messages = row_count;
end $$;

-- For people. ----------------------------------------------------------------------------------------------

create view bridge.webhook_endpoints as
    select e.id, e.url, e.topics, e.description, e.concurrency, e.rate, e.created_at, e.disabled_at, e.disabled_why,
           case when e.open_until is null then 'closed' when e.open_until > clock_timestamp() then 'open' else 'half open' end
               as breaker,
           e.failures, e.open_until, e.paused_until, e.failing_since, e.last_success_at,
           (select count(*) from bridge.webhook_delivery d where d.state = 'due' and d.endpoint = e.id) as due,
           (select count(*) from bridge.webhook_delivery d where d.state = 'sending' and d.endpoint = e.id) as sending,
           (select count(*) from bridge.webhook_delivery d where d.state = 'failed' and d.endpoint = e.id) as failed,
           (select count(*) from bridge.webhook_delivery d where d.state = 'skipped' and d.endpoint = e.id) as skipped
    from bridge.webhook_endpoint e;

comment on view bridge.webhook_endpoints is 'The endpoints with what waits for each, and how each is.';

-- The latest of each state, so that what is done does not hide what is to be done.
create function bridge.endpoint_deliveries(endpoint bigint, most integer default 20)
returns table (
    id bigint, event_id uuid, topic text, key text, state text, attempts integer, due_at timestamptz,
    last_status integer, last_error text, created_at timestamptz, finished_at timestamptz)
language sql stable security definer set search_path = pg_catalog, bridge, pg_temp set enable_seqscan = off as $$
    select d.id, d.event_id, m.topic, m.key, d.state, d.attempts, d.due_at, d.last_status, d.last_error, d.created_at,
           d.finished_at
    from (
        (select n.* from bridge.webhook_delivery n where n.state = 'sending' and n.endpoint = endpoint_deliveries.endpoint
         order by n.due_at, n.id limit most)
        union all
        (select n.* from bridge.webhook_delivery n where n.state = 'due' and n.endpoint = endpoint_deliveries.endpoint
         order by n.due_at, n.id limit most)
        union all
        (select n.* from (
            (select f.* from bridge.webhook_delivery f where f.state = 'done' and f.endpoint = endpoint_deliveries.endpoint
             order by f.finished_at desc, f.id desc limit most)
            union all
            (select f.* from bridge.webhook_delivery f where f.state = 'failed' and f.endpoint = endpoint_deliveries.endpoint
             order by f.finished_at desc, f.id desc limit most)
            union all
            (select f.* from bridge.webhook_delivery f where f.state = 'skipped' and f.endpoint = endpoint_deliveries.endpoint
             order by f.finished_at desc, f.id desc limit most)) as n
         order by n.finished_at desc, n.id desc limit most)
    ) as d
    join bridge.webhook_message m on m.event_id = d.event_id
    order by d.finished_at desc nulls first, d.due_at, d.id desc
$$;

comment on function bridge.endpoint_deliveries(bigint, integer) is
    'What is sent and due next at an endpoint, and what was finished there last: at most so many of each.';
