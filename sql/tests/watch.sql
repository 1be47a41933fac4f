-- bridge.watch(): topics, keys, payloads, columns, operations.
select plan(34);
create schema "Größe";
create table "Größe"."my.orders" (id int primary key, "State" text, price numeric, note text);
create function pg_temp.last(n int) returns table (topic text, key text, payload jsonb) language sql as
  'select topic, key, payload::jsonb from (select * from bridge.emitted() order by id desc limit n) l order by id';

select lives_ok($$ select bridge.watch('"Größe"."my.orders"') $$, 'a table with quoted names is watched');
insert into "Größe"."my.orders" values (1, 'new', 9.50, E'a "b"\n\\'), (2, 'new', null, null);
select results_eq('select * from pg_temp.last(2)', $$ values
  ('Größe.my.orders.inserted', '1', '{"operation": "insert", "schema": "Größe", "table": "my.orders", "old": null,
    "new": {"id": 1, "State": "new", "price": 9.50, "note": "a \"b\"\n\\"}}'::jsonb),
  ('Größe.my.orders.inserted', '2', '{"operation": "insert", "schema": "Größe", "table": "my.orders", "old": null,
    "new": {"id": 2, "State": "new", "price": null, "note": null}}') $$, 'one event for each row inserted');
update "Größe"."my.orders" set id = id + 100, "State" = 'paid' where id > 0;
select results_eq('select topic, key, payload -> ''old'' ->> ''id'', payload -> ''new'' ->> ''id'' from pg_temp.last(2) order by 2', $$ values
  ('Größe.my.orders.updated', '101', '1', '101'), ('Größe.my.orders.updated', '102', '2', '102') $$,
  'old and new rows are paired though the primary keys change');
delete from "Größe"."my.orders" where id = 102;
select results_eq('select * from pg_temp.last(1)', $$ values
  ('Größe.my.orders.deleted', '102', '{"operation": "delete", "schema": "Größe", "table": "my.orders", "new": null,
    "old": {"id": 102, "State": "paid", "price": null, "note": null}}'::jsonb) $$, 'a deleted row is the old one');
select is((select content_type from bridge.emitted() order by id desc limit 1), 'application/json', 'payloads are JSON');

select is((select count(*) from bridge.emitted()), 5::bigint, 'five events so far');
update "Größe"."my.orders" set note = note;
update "Größe"."my.orders" set note = 'x' where false;
delete from "Größe"."my.orders" where false;
select is((select count(*) from bridge.emitted()), 5::bigint, 'statements that change nothing emit nothing');

select bridge.watch('"Größe"."my.orders"', topic => 'order''s changed', key => 'State', columns => '{price,id}', operations => '{update}');
select is((select count(*) from pg_trigger where tgrelid = '"Größe"."my.orders"'::regclass and not tgisinternal), 1::bigint,
  'watching again replaces');
insert into "Größe"."my.orders" values (7, 'new', 1, null);
update "Größe"."my.orders" set note = 'y';
select is((select count(*) from bridge.emitted()), 5::bigint, 'other operations and other columns emit nothing');
update "Größe"."my.orders" set price = 2, note = 'z' where id = 7;
select results_eq('select * from pg_temp.last(1)', $$ values
  ('order''s changed', 'new', '{"operation": "update", "schema": "Größe", "table": "my.orders",
    "new": {"id": 7, "price": 2}, "old": {"id": 7, "price": 1}}'::jsonb) $$, 'topic, key and columns are as they were asked for');
alter table "Größe"."my.orders" add column secret text default 's';
update "Größe"."my.orders" set price = 3, secret = 't' where id = 7;
select is((select payload -> 'new' from pg_temp.last(1)), '{"id": 7, "price": 3}', 'a column that is added later stays out');
insert into "Größe"."my.orders" values (7, 'new', 4, null) on conflict (id) do update set price = excluded.price;
select is((select payload -> 'new' from pg_temp.last(1)), '{"id": 7, "price": 4}', 'an upsert is an update');
alter table "Größe"."my.orders" rename column price to amount;
select throws_ok($$ update "Größe"."my.orders" set amount = 5 $$, '42703', 'bridge.watch() was told of the column price, which "Größe"."my.orders" no longer has',
  'a renamed column is told, not lost');
select bridge.watch('"Größe"."my.orders"');
update "Größe"."my.orders" set amount = 6 where id = 7;
select is((select payload -> 'new' ->> 'secret' from pg_temp.last(1)), 't', 'watching all columns takes the added ones');

select lives_ok($$ select bridge.unwatch('"Größe"."my.orders"') $$, 'unwatch()');
select lives_ok($$ select bridge.unwatch('"Größe"."my.orders"') $$, 'twice is harmless');
update "Größe"."my.orders" set amount = 7;
select is((select payload -> 'new' ->> 'amount' from pg_temp.last(1)), '6', 'ends it');

-- The mend that the hint gives.
create table renamed (id int primary key, v int);
select bridge.watch('renamed');
alter table renamed rename column id to number;
select throws_ok('insert into renamed values (1, 1)', '42703', 'bridge.watch() was told of the column id, which public.renamed no longer has',
  'so is a renamed key column');
select lives_ok($$ select bridge.watch('renamed'); insert into renamed values (1, 1) $$, 'watching again mends it');
select is((select key from bridge.emitted() order by id desc limit 1), '1', 'with the key''s new name');

create table long_keys (id text primary key, n int);
select bridge.watch('long_keys');
select lives_ok($$ insert into long_keys values (repeat('é', 512), 1) $$, 'a key of 1,024 bytes');
select throws_ok($$ insert into long_keys values (repeat('é', 512) || 'x', 1) $$, '22023',
  'the key of an event of the watched table public.long_keys has 1025 bytes; 1024 are allowed', 'one byte more is told to the writer');
select throws_ok($$ update long_keys set id = id || 'x' $$, '22023', null, 'of an update as well');
select bridge.watch('long_keys', key => 'n');
select lives_ok($$ update long_keys set id = id || 'x' $$, 'watching by a shorter column mends it');

create table composite (a int, "B" text, c int, primary key ("B", a));
select bridge.watch('composite');
insert into composite values (1, 'x, "1"', 0), (11, 'x', 0);
select results_eq('select key from pg_temp.last(2)', $$ values ('["x, \"1\"", 1]'), ('["x", 11]') $$,
  'a composite key is a JSON array in the key''s order');

create table many (id int primary key, v int);
select bridge.watch('many');
insert into many select i, 0 from generate_series(1, 3) i;
update many set v = 1;
truncate many;
insert into many select i, 0 from generate_series(1, 20000) i;
update many set id = -id, v = id;
select is((select count(*) from bridge.emitted() where topic like '%.many.updated'), 20003::bigint, 'a bulk update emits one event a row');
select is_empty($$ select from bridge.emitted() where topic like '%.many.updated' and payload::jsonb -> 'old' ->> 'v' = '0'
  and payload::jsonb -> 'new' ->> 'v' <> '1' and payload::jsonb -> 'new' ->> 'v' <> payload::jsonb -> 'old' ->> 'id' $$,
  'and pairs every one');
select is_empty($$ select from (select id, created_at, lag(created_at) over (order by id) as before from bridge.emitted()) e
  where before > created_at $$, 'ids are in the order of recording');

create table parted (id int, region text, v int default 0, primary key (id, region)) partition by list (region);
create table parted_eu partition of parted for values in ('eu');
create table parted_us partition of parted for values in ('us');
select lives_ok($$ select bridge.watch('parted') $$, 'a partitioned table is watched');
insert into parted values (1, 'eu'), (2, 'us'), (3, 'eu');
select results_eq('select topic, key from pg_temp.last(3) order by 2', $$ values
  ('public.parted.inserted', '[1, "eu"]'), ('public.parted.inserted', '[2, "us"]'), ('public.parted.inserted', '[3, "eu"]') $$,
  'its partitions are one table');
update parted set region = case region when 'eu' then 'us' else 'eu' end, v = id;
select results_eq($$ select payload -> 'old' ->> 'id', payload -> 'new' ->> 'id', payload -> 'old' ->> 'region', payload -> 'new' ->> 'region'
  from pg_temp.last(3) order by 1 $$, $$ values ('1', '1', 'eu', 'us'), ('2', '2', 'us', 'eu'), ('3', '3', 'eu', 'us') $$,
  'rows that move between partitions are paired');
create function pg_temp.discard() returns trigger language plpgsql as 'begin return null; end';
create trigger discard before insert on parted_us for each row execute function pg_temp.discard();
select throws_ok($$ update parted set region = 'us' where id = 2 $$, '27000', null, 'pairs that cannot be told are refused');
select is((select count(*) from bridge.emitted() where topic = 'public.parted.updated'), 3::bigint, 'and emit nothing');

create type mood as enum ('sad', 'happy');
create table typed (id uuid primary key, m mood, d date, ts timestamptz, b bytea, j json, arr int[], nan float8);
select bridge.watch('typed');
set local timezone = 'UTC'; set local datestyle = 'German';
insert into typed values ('11111111-1111-1111-1111-111111111111', 'happy', '2026-11-21', '2026-11-21 10:00:00+00', '\x00ff', '{"a":  1}', '{1,2}', 'NaN');
select results_eq('select key, payload -> ''new'' from pg_temp.last(1)', $$ values ('11111111-1111-1111-1111-111111111111',
  '{"id": "11111111-1111-1111-1111-111111111111", "m": "happy", "d": "2026-11-21", "ts": "2026-11-21T10:00:00+00:00",
    "b": "\\x00ff", "j": {"a": 1}, "arr": [1, 2], "nan": "NaN"}'::jsonb) $$, 'values look the same whatever the session''s date style');
select * from finish();
