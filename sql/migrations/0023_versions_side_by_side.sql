-- oldest program: 0021
-- From here on each migration says in its first line which programs may go on, or start, on what it leaves: those that know
-- the schema of that version, or a newer one. Without that line, only those that know the migration itself.
alter table bridge.migration add column oldest_program int;
comment on column bridge.migration.oldest_program is
  'Programs that know this version of the schema or a newer one may run on it. Null: the migration''s own version.';
update bridge.migration set oldest_program = 21 where version = 22;
