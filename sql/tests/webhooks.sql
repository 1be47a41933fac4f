-- What people give for webhooks: what is taken, and what is refused with a word on how to mend it.
select plan(130);
create function pg_temp.refuses(statement text, code text, message text) returns text language sql as
  $$ select throws_like(statement, message, message) || e'\n' || throws_ok(statement, code) $$;

-- URLs.
select lives_ok(format($$ select bridge.check_webhook_url(%L) $$, url), url) from unnest(array[
  'https://example.com', 'https://example.com/a/b?c=d&e=f', 'http://example.com:8080/', 'https://a.b.c.example.com.:443',
  'https://[2001:db8::1]/x', 'https://[::1]:65535', 'https://192.0.2.1', 'https://under_score.example/x', 'https://x?y',
  'https://example.com/' || repeat('x', 2028)]) as url;
select pg_temp.refuses(format($$ select bridge.check_webhook_url(%L) $$, url), '22023', message) from (values
  ('', '%does not begin with https://%'),
  ('example.com', '%does not begin with https://%'),
  ('ftp://example.com', '%does not begin with https://%'),
  ('HTTPS://example.com', '%does not begin with https://%'),
  (' https://example.com', '%does not begin with https://%'),
  ('https://', '%no proper host%'),
  ('https:///path', '%no proper host%'),
  ('https://?x', '%no proper host%'),
  ('https://exa mple.com', '%visible ASCII%'),
  ('https://example.com/ü', '%visible ASCII%'),
  (E'https://example.com/\r\nHost: x', '%visible ASCII%'),
  ('https://-example.com', '%no proper host%'),
  ('https://example.com:0', '%port that does not exist%'),
  ('https://example.com:65536', '%port that does not exist%'),
  ('https://example.com:x', '%no proper host%'),
  ('https://[fe80::1%25eth0]/', '%no proper host%'),
  ('https://exa\mple.com', '%a backslash%'),
  ('https://a..b', '%no proper host%'),
  ('https://a.b..', '%no proper host%'),
  ('https://a:', '%no proper host%'),
  ('https://a:1:2', '%no proper host%'),
  ('https://[::1', '%no proper host%'),
  ('https://[1:2]', '%no proper host%'),
  ('https://[10.0.0.1]', '%no proper host%'),
  ('https://0x7f.1', '%no proper host%'),
  ('https://127.1', '%no proper host%'),
  ('https://127.0.0.01', '%no proper host%'),
  ('https://256.0.0.1', '%no proper host%'),
  ('https://' || repeat('x', 64) || '.example', '%no proper host%'),
  ('https://me:hush@example.com', '%a user or a password%'),
  ('https://example.com/#top', '%fragment%'),
  ('https://example.com/' || repeat('x', 2029), '%2049 bytes%')) as wrong (url, message);
select throws_ok($$ select bridge.add_endpoint(null, '{#}') $$, '22004');
select throws_ok($$ select bridge.add_endpoint('https://me:hush@example.com', '{#}') $$, '22023',
  'the URL of a webhook has a user or a password in it', 'and repeats it nowhere');

-- Patterns of topics.
select lives_ok(format($$ select bridge.check_topic_patterns(%L) $$, patterns), patterns) from unnest(array[
  '{#}', '{*}', '{a.*.b,#.c,a.#}', '{a..b}', '{ü}', '{a>b}']) as patterns;
select pg_temp.refuses(format($$ select bridge.check_topic_patterns(%L) $$, patterns), '22023', message) from (values
  ('{}', '%without topics%'),
  ('{a,""}', '%is empty%'),
  ('{a,null}', '%is empty%'),
  ('{a.>}', '%> is no wildcard%'),
  ('{a.b*}', '%whole words%'),
  ('{##}', '%whole words%'),
  ('{' || repeat('ü', 128) || '}', '%256 bytes%')) as wrong (patterns, message);

-- Limits.
select throws_ok(format($$ select bridge.add_endpoint('https://example.com', '{#}', %s) $$, given), '22023') from unnest(array[
  'concurrency => 0', 'concurrency => 1001', 'rate => 0', 'rate => -1', 'rate => ''NaN''', 'rate => 1e7']) as given;

-- Secrets.
select matches((select signing_secret from bridge.add_endpoint('https://example.com', '{#}')), '^whsec_[A-Za-z0-9+/]{43}=$',
  'a secret is made, of 32 bytes');
select isnt(bridge.make_webhook_secret(), bridge.make_webhook_secret(), 'another one each time');
select is((select signing_secret from bridge.add_endpoint('https://example.com', '{#}', secret => given)), given, left(given, 12))
  from unnest(array['whsec_' || encode(repeat('x', 24)::bytea, 'base64'), 'whsk_' || encode(repeat('x', 32)::bytea, 'base64')]) as given;
select throws_ok(format($$ select bridge.add_endpoint('https://example.com', '{#}', secret => %L) $$, given), '22023')
  from unnest(array['', 'hush', 'whsec_hush!', 'whsec_aHVzaA==', 'whpk_' || encode(repeat('x', 32)::bytea, 'base64'),
    'whsk_aHVzaA==']) as given;

-- Rotation.
insert into bridge.webhook_secret (endpoint, secret, created_at, expires_at)
  select max(id), 'whsec_long_ago', now() - interval '3 days', now() - interval '1 day' from bridge.webhook_endpoint;
select throws_ok($$ select bridge.rotate_secret(max(id)) from bridge.webhook_endpoint $$, '22023', null,
  'SQL makes no key pair in the place of one');
select throws_ok($$ select bridge.rotate_secret(max(id), secret => 'whsk_' || encode(repeat('x', 32)::bytea, 'base64'))
  from bridge.webhook_endpoint $$, '22023', null, 'the same secret is no other');
select throws_ok($$ select bridge.rotate_secret(max(id), '-1 hour', bridge.make_webhook_secret()) from bridge.webhook_endpoint $$,
  '22023', null, 'a time of grace is not negative');
select matches((select bridge.rotate_secret(max(id), secret => bridge.make_webhook_secret()) from bridge.webhook_endpoint),
  '^whsec_', 'another kind if one is given');
select results_eq($$ select left(secret, 6), expires_at between now() + interval '23 hours' and now() + interval '25 hours'
    from bridge.webhook_secret where endpoint = (select max(id) from bridge.webhook_endpoint) order by expires_at nulls last $$,
  $$ values ('whsk_e', true), ('whsec_', null::boolean) $$, 'the old one for a day, those that ended no more');
select isnt((select bridge.rotate_secret(max(id), '0') from bridge.webhook_endpoint), null, 'at once');
select is((select count(*) from bridge.webhook_secret where endpoint = (select max(id) from bridge.webhook_endpoint)), 1::bigint,
  'then only the new one is left');

-- What is not there.
select throws_ok(format('select bridge.%s', call), 'P0002', null, call) from unnest(array[
  'change_endpoint(0)', 'rotate_secret(0)', 'disable_endpoint(0)', 'enable_endpoint(0)', 'recover_endpoint(0, now())',
  'remove_endpoint(0)', 'remove_endpoint(null)', 'resend_delivery(0)']) as call;
select throws_ok($$ select bridge.recover_endpoint(1, null) $$, '22004');
select throws_ok($$ select bridge.webhook_fan_out(gen_random_uuid(), '{"a": 1}') $$, '22023', null, 'a result of another handler');
select throws_ok($$ select bridge.webhook_fan_out(gen_random_uuid(), null) $$, '22023', null, 'or none');
select * from finish();
