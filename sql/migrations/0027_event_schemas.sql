-- oldest program: 0024
-- What this database emits, for `pgbridge asyncapi`: what bridge.watch() was told of every table, and schemas that somebody
-- registers for events that are emitted by hand. They document: emit() looks at none of them, and costs what it did.

create table bridge.event_schema (
  topic         text primary key,
  schema        json not null,        -- a JSON Schema, as its author wrote it
  description   text not null,
  content_type  text not null check (content_type in ('application/json', 'text/plain')),
  registered_by text not null default session_user,
  registered_at timestamptz not null default clock_timestamp()
);
comment on table bridge.event_schema is 'Schemas of events that are emitted by hand, for pgbridge asyncapi. No event is compared with them.';

-- Whether the items of an array are strings, each once.
create function bridge.are_distinct_strings(items jsonb) returns boolean
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return (select count(*) filter (where jsonb_typeof(i.item) = 'string') = count(*) and count(distinct i.item) = count(*)
          from jsonb_array_elements(case when jsonb_typeof(items) = 'array' then items else '[0]' end) as i(item));

-- What a keyword of JSON Schema (draft-07) must hold, where it holds something else; null where it is right, and for a word
-- that is no keyword. What stands in it is not looked at.
create function bridge.json_schema_wants(keyword text, held jsonb) returns text
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  kind constant text := jsonb_typeof(held);
  types constant jsonb := '["null", "boolean", "object", "array", "number", "string", "integer"]';
begin
  return case
    when keyword = 'type' and not case kind when 'string' then held <@ types
                                            when 'array' then held <@ types and held <> '[]' and bridge.are_distinct_strings(held)
                                            else false end
      then 'must be null, boolean, object, array, number, string or integer, or an array of some of them'
    when keyword in ('properties', 'patternProperties', 'definitions', '$defs', 'dependencies') and kind <> 'object'
      then 'must be an object, with a schema under each name'
    when keyword in ('allOf', 'anyOf', 'oneOf') and (kind <> 'array' or held = '[]') then 'must be an array of schemas'
    when keyword = 'items' and held = '[]' then 'must be a schema, or an array of some'
    when keyword = 'required' and not bridge.are_distinct_strings(held) then 'must be an array of names, each once'
    when keyword = 'enum' and (kind <> 'array' or held = '[]') then 'must be an array of values'
    when keyword = 'examples' and kind <> 'array' then 'must be an array'
    when keyword in ('title', 'description', '$comment', 'format', 'pattern', 'contentEncoding', 'contentMediaType', '$ref',
                     'discriminator') and kind <> 'string' then 'must be a string'
    when keyword in ('minLength', 'maxLength', 'minItems', 'maxItems', 'minProperties', 'maxProperties')
         and not (kind = 'number' and held::text ~ '^\d+(\.0+)?$') then 'must be a whole number, of zero or more'
    when keyword in ('minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum') and kind <> 'number' then 'must be a number'
    when keyword = 'multipleOf' and not case kind when 'number' then held::numeric > 0 else false end
      then 'must be a number above zero'
    when keyword in ('uniqueItems', 'readOnly', 'writeOnly', 'deprecated') and kind <> 'boolean' then 'must be true or false'
    when keyword in ('prefixItems', 'unevaluatedItems', 'unevaluatedProperties', 'dependentSchemas', 'dependentRequired',
                     'minContains', 'maxContains', '$anchor', '$dynamicRef', '$dynamicAnchor', '$recursiveRef')
      then 'is of a later draft of JSON Schema; AsyncAPI has draft-07'
    when keyword in ('$id', '$schema') then 'may stand at the top only'
    when keyword = 'externalDocs' then 'is not taken; write it into the description'
  end;
end
$$;

-- A $ref that leads nowhere in the schema; null where each leads somewhere. Those in examples and constants count: whoever reads
-- the document follows them, too.
create function bridge.stray_ref(schema jsonb) returns text
  language sql immutable
  set search_path = pg_catalog, bridge, pg_temp
  return (
    select r.target
    from jsonb_path_query(schema, '$.** ? (@.type() == "object").keyvalue() ? (@.key == "$ref" && @.value.type() == "string")') as k(ref)
    cross join lateral (select k.ref ->> 'value') as r(target)
    where r.target !~ '^#(/|$)' or r.target <> '#' and schema #> array(
      select replace(replace(p.part, '~1', '/'), '~0', '~')
      from unnest((string_to_array(r.target, '/'))[2:]) with ordinality as p(part, n) order by p.n) is null
    limit 1
  );

-- What is wrong with a JSON Schema, with the place as a JSON pointer; null where nothing is.
create function bridge.json_schema_fault(schema jsonb, place text) returns text
  language plpgsql immutable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  word record;
  part record;
  fault text;
begin
  if jsonb_typeof(schema) = 'boolean' then
    return null;
  elsif jsonb_typeof(schema) <> 'object' then
    return format('%s is a JSON %s; a schema is an object, or true or false', place, jsonb_typeof(schema));
  end if;
  for word in
    select e.key, e.value as held, jsonb_typeof(e.value) as kind,
           format('%s/%s', place, replace(replace(e.key, '~', '~0'), '/', '~1')) as place
    from jsonb_each(schema) as e
  loop
    fault := bridge.json_schema_wants(word.key, word.held);
    if fault is not null then
      return format('%s %s', word.place, fault);
    end if;
    for part in
      select word.held as held, word.place as place
      where word.key in ('additionalItems', 'additionalProperties', 'contains', 'propertyNames', 'not', 'if', 'then', 'else')
         or word.key = 'items' and word.kind <> 'array'
      union all
      select i.held, format('%s/%s', word.place, i.n - 1)
      from jsonb_array_elements(case when word.kind = 'array' then word.held else '[]' end) with ordinality as i(held, n)
      where word.key in ('allOf', 'anyOf', 'oneOf', 'items')
      union all
      select e.value, format('%s/%s', word.place, replace(replace(e.key, '~', '~0'), '/', '~1'))
      from jsonb_each(case when word.kind = 'object' then word.held else '{}' end) as e
      where word.key in ('properties', 'patternProperties', 'definitions', '$defs')
         or word.key = 'dependencies' and not bridge.are_distinct_strings(e.value)
    loop
      fault := bridge.json_schema_fault(part.held, part.place);
      if fault is not null then
        return fault;
      end if;
    end loop;
  end loop;
  return null;
end
$$;

create function bridge.register_schema(
    topic text, schema json, description text default '', content_type text default 'application/json') returns void
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  parsed constant jsonb := schema::jsonb;
  draft constant text := case when jsonb_typeof(parsed) = 'object' then parsed ->> '$schema' end;
  fault text;
begin
  perform bridge.check_topic(topic);
  if string_to_array(topic, '.') && array['*', '#', '>'] then
    raise exception 'a schema is registered for one topic, and % is a pattern', quote_literal(topic)
      using errcode = 'invalid_parameter_value', hint = 'Give the topic that emit() is given, such as shop.order.placed.';
  elsif content_type is null or content_type not in ('application/json', 'text/plain') then
    raise exception 'the content type of topic % is %', quote_literal(topic), coalesce(quote_literal(content_type), 'null')
      using errcode = 'invalid_parameter_value',
            hint = 'Events of emit() with json or jsonb are application/json; with text, and those of notify(), text/plain.';
  elsif schema is null then
    raise exception 'the schema of topic % is null', quote_literal(topic)
      using errcode = 'null_value_not_allowed', hint = 'Give a JSON Schema, or call bridge.unregister_schema().';
  end if;
  fault := case
    when jsonb_typeof(parsed) <> 'object' then format('it is a JSON %s, and not an object', jsonb_typeof(parsed))
    when draft !~ '^https?://json-schema\.org/draft-07/schema#?$' then
      format('#/$schema is %s, and AsyncAPI has draft-07 (http://json-schema.org/draft-07/schema#)', quote_literal(draft))
    when bridge.stray_ref(parsed) is not null then
      format('a $ref leads to %s, which is not in it; put it under definitions, and write #/definitions/...',
             quote_literal(bridge.stray_ref(parsed)))
    else bridge.json_schema_fault(parsed - '{$schema,$id}'::text[], '#') end;
  if fault is not null then
    raise exception 'the schema of topic % is no JSON Schema: %', quote_literal(topic), fault
      using errcode = 'invalid_parameter_value',
            hint = 'Such as: {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}';
  end if;
  insert into bridge.event_schema (topic, schema, description, content_type)
    values (register_schema.topic, register_schema.schema, coalesce(register_schema.description, ''), register_schema.content_type)
  on conflict on constraint event_schema_pkey do update
    set schema = excluded.schema, description = excluded.description, content_type = excluded.content_type,
        registered_by = excluded.registered_by, registered_at = excluded.registered_at;
end
$$;
comment on function bridge.register_schema(text, json, text, text) is
  'Says what the payload of a topic''s events is, as a JSON Schema (draft-07), for pgbridge asyncapi. It replaces what was said before; no event is compared with it.';

create function bridge.unregister_schema(topic text) returns boolean
  language plpgsql volatile security definer
  set search_path = pg_catalog, bridge, pg_temp
as $$
begin
  delete from bridge.event_schema as s where s.topic = unregister_schema.topic;
  return found;
end
$$;
comment on function bridge.unregister_schema(text) is 'Forgets the schema of a topic. False: none is registered.';

-- The triggers of watch(), of one table or of all, that are enabled. `told` is what watch() was told; null where an older version
-- did not write it down.
create function bridge.watches(of_table regclass default null)
  returns table (watched regclass, capture text, operation text, told jsonb)
  language sql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
  select t.tgrelid::regclass, p.proname::text,
         case when t.tgtype & 4 > 0 then 'insert' when t.tgtype & 8 > 0 then 'delete' else 'update' end,
         bridge.json_object(obj_description(p.oid, 'pg_proc'))
  from pg_trigger as t join pg_proc as p on p.oid = t.tgfoid
  where (of_table is null or t.tgrelid = of_table) and not t.tgisinternal and t.tgenabled in ('O', 'A')
    and p.pronamespace = 'bridge'::regnamespace and p.proname ~ '^capture(_(insert|update|delete)_[0-9a-f]{12})?$'
$$;
comment on function bridge.watches(regclass) is 'What bridge.watch() was told: one row for each table and operation.';

-- As 0026 made it, over watches().
create or replace function bridge.watch_of(
    watched regclass, out captures text[], out operations text[], out topic text, out keys text[], out columns text[])
  language plpgsql stable
  set search_path = pg_catalog, bridge, pg_temp
as $$
declare
  told jsonb[];
begin
  select array_agg(w.capture order by w.capture), array_agg(distinct w.operation), array_agg(w.told order by w.capture),
         case when count(distinct w.topic) = 1 then min(w.topic) end
  into captures, operations, told, topic
  from (
    select n.capture, n.operation, n.told,
           case when n.told ->> 'topic' like '%.' || n.suffix
                then left(n.told ->> 'topic', -length(n.suffix)) || 'read' else n.told ->> 'topic' end as topic
    from (
      select c.capture, c.operation, c.told,
             case c.operation when 'insert' then 'inserted' when 'update' then 'updated' else 'deleted' end as suffix
      from bridge.watches(watched) as c
    ) as n
  ) as w;
  if captures is null then
    raise exception '% is not watched', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Rows are sent beside their changes, or they would soon be wrong: select bridge.watch(%L).', watched);
  elsif array_position(told, null) is not null then
    raise exception '% was watched by an older version, which did not write down how', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Watch it again, with the topic, key and columns that are wanted: select bridge.watch(%L, ...).', watched);
  elsif (select count(distinct (u.t -> 'keys', u.t -> 'columns')) from unnest(told) as u(t)) > 1 then
    raise exception '% has triggers of bridge.watch() that were told different keys or columns', watched
      using errcode = 'object_not_in_prerequisite_state',
            hint = format('Some were made by hand. Watch it again: select bridge.watch(%L, ...).', watched);
  end if;
  keys := array(select jsonb_array_elements_text(told[1] -> 'keys'));
  columns := case when told[1] -> 'columns' <> 'null' then array(select jsonb_array_elements_text(told[1] -> 'columns')) end;
end
$$;
