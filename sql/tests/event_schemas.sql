-- Schemas of events that are emitted by hand, and what watches() tells of the tables that are watched.
select plan(51);
create function pg_temp.registered() returns table (topic text, schema text, description text, content_type text) language sql as
  $$ select topic, schema::text, description, content_type from bridge.event_schema order by topic $$;
create function pg_temp.refused(schema json, why text) returns text language sql as $test$
  select throws_ok(format('select bridge.register_schema(%L, %L)', 't', schema), '22023',
                   'the schema of topic ''t'' is no JSON Schema: ' || why, coalesce(schema::text, 'null'))
$test$;
create function pg_temp.taken(schema json) returns text language sql as $test$
  select lives_ok(format('select bridge.register_schema(%L, %L)', 'taken', schema), schema::text)
$test$;

-- Registering.
select bridge.register_schema('shop.order.placed', '{"type": "object", "b": 1, "a": 2}', 'An order was placed.');
select results_eq('select * from pg_temp.registered()', $$ values
  ('shop.order.placed', '{"type": "object", "b": 1, "a": 2}', 'An order was placed.', 'application/json') $$, 'a schema stays as its author wrote it');
select bridge.register_schema('shop.order.placed', '{"type": "string"}', content_type => 'text/plain', description => null);
select results_eq('select * from pg_temp.registered()', $$ values ('shop.order.placed', '{"type": "string"}', '', 'text/plain') $$,
  'registering again replaces all of it');
select is((select registered_by from bridge.event_schema), session_user::text, 'and says who it was');
select is(bridge.unregister_schema('shop.order.placed'), true, 'it is forgotten');
select is(bridge.unregister_schema('shop.order.placed'), false, 'once');
select lives_ok($$ select bridge.register_schema('t', '{"type": "object"}'), bridge.emit('t', '[]'::jsonb) $$, 'no event is compared with it');

-- What is refused.
select throws_ok($$ select bridge.register_schema('', '{}') $$, '22023', 'the topic of an event is empty', 'an empty topic');
select throws_ok($$ select bridge.register_schema(repeat('x', 256), '{}') $$, '22023', 'the topic of an event has 256 bytes; 255 are allowed', 'a long one');
select throws_ok($$ select bridge.register_schema(null, '{}') $$, '22004', 'the topic of an event is null', 'none');
select throws_ok($$ select bridge.register_schema('shop.#', '{}') $$, '22023', 'a schema is registered for one topic, and ''shop.#'' is a pattern', 'a pattern');
select throws_ok($$ select bridge.register_schema('t', null) $$, '22004', 'the schema of topic ''t'' is null', 'no schema');
select throws_ok($$ select bridge.register_schema('t', '{}', content_type => 'text/html') $$, '22023', 'the content type of topic ''t'' is ''text/html''',
  'a content type that no event has');
select pg_temp.refused('[]', 'it is a JSON array, and not an object');
select pg_temp.refused('null', 'it is a JSON null, and not an object');
select pg_temp.refused('true', 'it is a JSON boolean, and not an object');
select pg_temp.refused('{"type": "text"}', '#/type must be null, boolean, object, array, number, string or integer, or an array of some of them');
select pg_temp.refused('{"type": []}', '#/type must be null, boolean, object, array, number, string or integer, or an array of some of them');
select pg_temp.refused('{"type": ["null", "null"]}', '#/type must be null, boolean, object, array, number, string or integer, or an array of some of them');
select pg_temp.refused('{"properties": {"a/b": {"type": 1}}}',
  '#/properties/a~1b/type must be null, boolean, object, array, number, string or integer, or an array of some of them');
select pg_temp.refused('{"properties": {"id": "integer"}}', '#/properties/id is a JSON string; a schema is an object, or true or false');
select pg_temp.refused('{"properties": ["id"]}', '#/properties must be an object, with a schema under each name');
select pg_temp.refused('{"items": [{}, 3]}', '#/items/1 is a JSON number; a schema is an object, or true or false');
select pg_temp.refused('{"items": "string"}', '#/items is a JSON string; a schema is an object, or true or false');
select pg_temp.refused('{"anyOf": []}', '#/anyOf must be an array of schemas');
select pg_temp.refused('{"not": {"allOf": [{"required": "id"}]}}', '#/not/allOf/0/required must be an array of names, each once');
select pg_temp.refused('{"required": ["id", "id"]}', '#/required must be an array of names, each once');
select pg_temp.refused('{"enum": []}', '#/enum must be an array of values');
select pg_temp.refused('{"examples": {}}', '#/examples must be an array');
select pg_temp.refused('{"description": 1}', '#/description must be a string');
select pg_temp.refused('{"maxLength": -1}', '#/maxLength must be a whole number, of zero or more');
select pg_temp.refused('{"maxItems": "1"}', '#/maxItems must be a whole number, of zero or more');
select pg_temp.refused('{"minimum": "1"}', '#/minimum must be a number');
select pg_temp.refused('{"multipleOf": 0}', '#/multipleOf must be a number above zero');
select pg_temp.refused('{"uniqueItems": 1}', '#/uniqueItems must be true or false');
select pg_temp.refused('{"prefixItems": []}', '#/prefixItems is of a later draft of JSON Schema; AsyncAPI has draft-07');
select pg_temp.refused('{"$schema": "https://json-schema.org/draft/2020-12/schema"}',
  '#/$schema is ''https://json-schema.org/draft/2020-12/schema'', and AsyncAPI has draft-07 (http://json-schema.org/draft-07/schema#)');
select pg_temp.refused('{"items": {"$id": "x"}}', '#/items/$id may stand at the top only');
select pg_temp.refused('{"$ref": "https://example.com/order.json"}',
  'a $ref leads to ''https://example.com/order.json'', which is not in it; put it under definitions, and write #/definitions/...');
select pg_temp.refused('{"items": {"$ref": "#/definitions/a"}, "definitions": {"b": {}}}',
  'a $ref leads to ''#/definitions/a'', which is not in it; put it under definitions, and write #/definitions/...');
select pg_temp.refused('{"examples": [{"$ref": "order.json"}]}',
  'a $ref leads to ''order.json'', which is not in it; put it under definitions, and write #/definitions/...');
select pg_temp.refused('{"externalDocs": {}}', '#/externalDocs is not taken; write it into the description');
select pg_temp.refused('{"dependencies": {"a": ["b", 1]}}', '#/dependencies/a is a JSON array; a schema is an object, or true or false');

select pg_temp.taken('{}');
select pg_temp.taken('{"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/order.json", "type": ["object", "null"]}');
select pg_temp.taken('{"properties": {"type": {"enum": ["a", null]}, "required": true, "$ref": {"type": "string"}}, "required": []}');
select pg_temp.taken('{"definitions": {"a/b~c": {"items": [{"$ref": "#"}, {"$ref": "#/definitions/a~1b~0c"}]}}, "additionalProperties": false, "x-own": 1}');
select pg_temp.taken('{"dependencies": {"a": ["b"], "c": {"minimum": -1.5}}, "multipleOf": 0.01, "maxLength": 0, "if": true}');

-- What watch() was told of all tables.
create table stock (id int primary key, v int);
create table notes (n text primary key);
select bridge.watch('stock', columns => '{v}');
select bridge.watch('notes', topic => 'noted', operations => '{delete}');
select results_eq($$ select watched::text, operation, told from bridge.watches() order by 1, 2 $$, $$ values
  ('notes', 'delete', '{"topic": "noted", "keys": ["n"], "columns": null}'::jsonb),
  ('stock', 'delete', '{"topic": "public.stock.deleted", "keys": ["id"], "columns": ["v"]}'),
  ('stock', 'insert', '{"topic": "public.stock.inserted", "keys": ["id"], "columns": ["v"]}'),
  ('stock', 'update', '{"topic": "public.stock.updated", "keys": ["id"], "columns": ["v"]}') $$, 'every table and operation');
select results_eq($$ select count(*) from bridge.watches('notes') $$, 'values (1::bigint)', 'or those of one table');
alter table stock disable trigger bridge_watch_insert;
select is((select count(*) from bridge.watches('stock')), 2::bigint, 'a trigger that is disabled tells of nothing');
create trigger old after insert on notes referencing new table as new_rows for each statement execute function bridge.capture('was.old', '{n}', '');
select results_eq($$ select operation, told from bridge.watches('notes') order by 1 desc $$,
  $$ values ('insert', null::jsonb), ('delete', '{"topic": "noted", "keys": ["n"], "columns": null}') $$, 'of one by an older version nothing is known');
select * from finish();
