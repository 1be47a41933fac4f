"""A watched table of every type that is odd in JSON, under odd names, and what is written to it."""

from typing import Final

import psycopg

TABLE: Final = '"Größe"."my.table {1}"'

KEY: Final = '"it\'s ""the"" id"'

_TYPES: Final = """
create schema "Größe";
create type "Größe".mood as enum ('so so', '1e3', 'it''s "x"', 'null', '');
create type "Größe".weekday as enum ('mo', 'tu');
create function "Größe".as_json("Größe".weekday) returns json language sql immutable as
  $$ select json_build_object('day', $1::text) $$;
create cast ("Größe".weekday as json) with function "Größe".as_json("Größe".weekday);
create domain "Größe".mail as text constraint has_at check (value like '%@%');
create domain "Größe".own_mail as "Größe".mail not null;
create domain "Größe".tags as varchar(5)[];
create type "Größe".place as (street text, "at %" point, feels "Größe".mood, sizes int[]);
comment on domain "Größe".mail is 'An address.';
"""
_COLUMNS: Final = """
  "it's ""the"" id" bigint generated always as identity primary key,
  "größe %s {0}" numeric(10, 2), plain numeric, r real, d double precision, small smallint, i int, big bigint,
  yes boolean, u uuid, j json, jb jsonb, raw bytea, m money,
  filled text not null default '', vc varchar(3), ch char(4), n name, "char" "char", o oid, class regclass,
  day date, ts timestamp, tz timestamptz, tm time, ttz timetz, iv interval,
  bits bit(3), vb bit varying(5), ip inet, net cidr, mac macaddr, at point, span int4range, spans int4multirange,
  words tsvector, ints int[], grid text[][], moods "Größe".mood[], days "Größe".weekday[], times timestamptz[],
  mood "Größe".mood, weekday "Größe".weekday, mail "Größe".mail, own "Größe".own_mail default 'me@x', tags "Größe".tags,
  place "Größe".place, places "Größe".place[],
  doubled int generated always as (small * 2) stored
"""
_VIRTUAL: Final = ", tripled int generated always as (small * 3) virtual"
_ROWS: Final = (
    "default values",
    """("größe %s {0}", plain, r, d, small, i, big, yes, u, j, jb, raw, m, vc, ch, n, "char", o, class, day, ts, tz, tm,
        ttz, iv, bits, vb, ip, net, mac, at, span, spans, words, ints, grid, moods, days, times, mood, weekday, mail,
        tags, place, places)
       values (-99999999.99, 1e40, 1e-30, 1e300, -16384, 2147483647, 9223372036854775807, true, gen_random_uuid(),
        '{"a": [1]}', '"text"', '\\x00ff', 12.5, 'äöü', 'ab', 'name', 'c', 42, 'pg_class', '2026-11-30',
        '2026-11-30 10:00:00.123456', '2026-11-30 10:00+02', '24:00', '10:00+05:30', '1 year 2 days 03:04:05.6', '101',
        '10101', '10.0.0.1/8', '10.0.0.0/8', '08:00:2b:01:02:03', '(1,2)', '[1,5)', '{[1,2),[5,6)}', 'a:1 b:2',
        '{1,null}', '{{a,null},{c,d}}', '{"1e3",null}', '{mo}', '{infinity,null}', '1e3', 'tu', 'a@b', '{12345,null}',
        row('s', '(1,2)', 'so so', '{1}'), array[row('s', null, null, null)::"Größe".place, null])""",
    """(plain, "größe %s {0}", r, d, day, ts, tz, j, jb, ints, place, mood)
       values ('NaN', 'NaN', 'NaN', '-Infinity', 'infinity', '-infinity', 'infinity', 'null', 'null', '{}',
        row(null, null, null, null), '')""",
    """(plain, r, d, day, ts, tz) values
       ('Infinity', 'Infinity', 'NaN', '0044-03-15 BC', '0044-03-15 01:02:03 BC', '0044-03-15 01:02:03+00 BC')""",
    "(day, ts, tz) values ('20000-01-01', '20000-01-01 01:02:03', '20000-01-01 01:02:03+00')",
    "(tz) values ('1700-01-01 00:00+00')",
)
_SESSIONS: Final = (
    "select 1",
    "set timezone = 'America/New_York'; set intervalstyle = 'iso_8601'; set bytea_output = 'escape'; "
    "set datestyle = 'German'; set extra_float_digits = 0",
)
"""Whoever writes decides some of the forms."""


def create_table(dsn: str, *, virtual: bool) -> None:
    """Makes the table, in a database with the schema `bridge`; `virtual`: as only PostgreSQL 18 has."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_TYPES.encode())
        connection.execute(f"create table {TABLE} ({_COLUMNS}{_VIRTUAL if virtual else ''})".encode())
        connection.execute(f"comment on table {TABLE} is E'All that\\nis odd.'".encode())
        connection.execute(f"comment on column {TABLE}.plain is 'Any number.'".encode())
        connection.execute("select bridge.watch(%s)", [TABLE])


def write(dsn: str) -> int:
    """Inserts, updates, deletes and backfills; returns how many events that makes."""
    events = 0
    for session in _SESSIONS:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(session.encode())
            for row in _ROWS:
                events += connection.execute(f"insert into {TABLE} {row}".encode()).rowcount
            events += connection.execute(f"update {TABLE} set filled = filled || 'x'".encode()).rowcount
    with psycopg.connect(dsn, autocommit=True) as connection:
        deleted = connection.execute(f"delete from {TABLE} where mod({KEY}, 2) = 0".encode())
        [(run,)] = connection.execute("select run from bridge.begin_backfill(%s, null, 'me', false)", [TABLE])
        [(read,)] = connection.execute("select taken from bridge.backfill_chunk(%s, 100, 10)", [run])
    return events + deleted.rowcount + int(read)
