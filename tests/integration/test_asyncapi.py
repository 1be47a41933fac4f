"""`pgbridge asyncapi`: what it says of events, compared with events, and what it refuses."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any, Final

import hypothesis
import psycopg
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import strategies
from jsonschema import Draft7Validator
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from bridge.cli import main
from bridge.postgres.schema import migrate
from tests.support import awkward
from tests.support.asyncapi import faults, parse
from tests.support.environment import ROOT
from tests.support.messages import execute

RABBITMQ: Final = """
[sinks.far]
type = "rabbitmq"
url = "amqps://reader:hunter2@mq1.example,[2001:db8::1]:5673/shop%2Ffront"
"""
EVERY_KIND: Final = f"""
{RABBITMQ}
[sinks.stream]
type = "nats"
url = "tls://reader:hunter2@nats.example"
[sinks.cloud]
type = "pubsub"
project = "my-project"
emulator_host = ""
"""
PLACED: Final = """{
  "$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/placed.json", "type": "object",
  "properties": {
    "order": {"type": "integer"}, "total": {"$ref": "#/definitions/money"}, "parts": {"items": {"$ref": "#"}}
  },
  "definitions": {"money": {"type": "string", "pattern": "^[0-9]+ [A-Z]{3}$"}}
}"""


def settings(dsn: str, sinks: str, *routes: tuple[str, str], more: str = "") -> str:
    """Those of a bridge; without routes every sink takes everything."""
    led = routes or [("#", name) for name in re.findall(r"^\[sinks\.(.*)\]$", sinks, re.MULTILINE)]
    lines = [f'[[routes]]\ntopic = "{topic}"\nsink = "{sink}"' for topic, sink in led]
    return "\n".join(['name = "test"', more, "[postgres]", f'dsn = "{dsn}"', sinks, *lines])


async def run(folder: Path, text: str, *arguments: str, expect: int = 0, said: str | None = "") -> tuple[str, str]:
    """What the command prints over these settings."""
    file = folder / "bridge.toml"
    file.write_text(text, encoding="utf-8")
    # In this process, since it takes seconds to start one where many tests run.
    words = ["asyncapi", "--config", str(file), *arguments]
    done = await asyncio.to_thread(CliRunner().invoke, main, words, prog_name="pgbridge")
    assert done.exit_code == expect, done.stderr
    assert said is None or done.stderr == said
    return done.stdout, done.stderr


async def document(folder: Path, text: str) -> dict[str, Any]:
    """The document, of which nothing is left out."""
    out, _ = await run(folder, text, "--format", "json")
    found: dict[str, Any] = json.loads(out)
    return found


def row_of(made: dict[str, Any]) -> dict[str, Any]:
    """The schema of the one table's rows."""
    [row] = [schema for name, schema in made["components"]["schemas"].items() if name.startswith("row.")]
    assert isinstance(row, dict)
    return row


@pytest.fixture(params=["18", "15"])
def odd_database(request: pytest.FixtureRequest) -> str:
    """A database with the awkward table, of each version."""
    dsn: str = request.getfixturevalue("bridge_database" if request.param == "18" else "debian_database")
    if request.param == "15":
        migrate(dsn)
    awkward.create_table(dsn, virtual=request.param == "18")
    return dsn


async def test_every_payload_of_a_table_is_as_its_schema_says(odd_database: str, tmp_path: Path) -> None:
    count = awkward.write(odd_database)
    made = await document(tmp_path, settings(odd_database, RABBITMQ))
    messages = {channel["title"]: channel["messages"] for channel in made["channels"].values()}
    events = await execute(odd_database, "select topic, payload from bridge.outbox order by id")
    assert len(events) == count
    row = row_of(made)
    operations = set()
    for topic, payload in events:
        value = json.loads(str(payload))
        operations.add(value["operation"])
        [message] = messages[str(topic)].values()
        assert faults(made, message["payload"], value) == []
        for part in filter(None, (value["new"], value["old"])):
            assert set(row["properties"]) == set(part)
    assert operations == {"insert", "update", "delete", "read"}


async def test_a_schema_takes_nothing_that_its_type_cannot_be(odd_database: str, tmp_path: Path) -> None:
    made = await document(tmp_path, settings(odd_database, RABBITMQ))
    columns = row_of(made)["properties"]
    for name, schema in columns.items():
        wrong = 17.5 if name == "place" else {"of": "another type"}
        assert bool(faults(made, schema, wrong)) is (name not in ("j", "jb", "weekday")), name
        assert bool(faults(made, schema, None)) is (name in ("filled", "own", 'it\'s "the" id')), name
    wrong_values = {
        "plain": "many", "small": 32768, "i": 2**31, "u": "x", "vc": "abcd", "ch": "abcde", "bits": "12",
        "vb": "101010", "day": "30.11.2026", "ts": "2026-11-30T10:00:00Z", "tz": "2026-11-30T10:00:00", "tm": "10:00",
        "ttz": "10:00:00", "mood": "other", "moods": ["other"], "ints": ["1"], "grid": ["not nested"],
        "tags": ["123456"], "times": ["now"], "place": {"street": "s"}, "places": [{}],
    }  # fmt: skip
    for name, value in wrong_values.items():
        assert faults(made, columns[name], value), name


async def test_comments_and_types_of_the_catalog_stand_in_the_schema(bridge_database: str, tmp_path: Path) -> None:
    awkward.create_table(bridge_database, virtual=True)
    row = row_of(await document(tmp_path, settings(bridge_database, RABBITMQ)))
    assert row["description"] == "All that\nis odd."
    columns = row["properties"]
    assert columns["plain"]["description"] == "Any number."
    assert columns["größe %s {0}"]["x-postgresql-type"] == "numeric(10,2)"
    assert columns["mail"]["description"] == "An address.\n\"Größe\".mail: CHECK ((VALUE ~~ '%@%'::text))"
    assert columns["moods"]["items"]["enum"] == ["so so", "1e3", 'it\'s "x"', "null", "", None]


async def test_the_parser_of_asyncapi_finds_nothing_to_mend(bridge_database: str, tmp_path: Path) -> None:
    awkward.create_table(bridge_database, virtual=True)
    await execute(bridge_database, "select bridge.register_schema('shop.order.placed', %s, 'An order.')", PLACED)
    await execute(bridge_database, "select bridge.register_schema('notes', '{\"type\": \"string\"}', '', 'text/plain')")
    text = settings(bridge_database, EVERY_KIND, more='channels = {listen = ["open channel"]}')
    out, _ = await run(tmp_path, text)
    made = await document(tmp_path, text)
    broken = json.dumps(
        made | {"info": {"title": "has no version"}, "channels": {}, "operations": {}, "components": {}}
    )
    of_yaml, of_broken = parse(out, broken)
    # 3.0 is what tools read; 3.1 has nothing that is needed here.
    assert [one for one in of_yaml["diagnostics"] if one["code"] != "asyncapi-latest-version"] == []
    assert of_yaml["read"] == made
    assert "asyncapi-document-resolved" in [one["code"] for one in of_broken["diagnostics"]]

    topics = 4 + 2 + 1
    assert len(made["channels"]) == 2 * topics + 1
    assert sum(len(channel["messages"]) for channel in made["channels"].values()) == 3 * topics


async def test_servers_are_named_without_their_logins(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, "select bridge.register_schema('a.b', '{}')")
    made = await document(tmp_path, settings(bridge_database, EVERY_KIND))
    places = {name: (at["protocol"], at["host"], at.get("pathname")) for name, at in made["servers"].items()}
    assert places == {
        "far-1": ("amqps", "mq1.example:5671", "/shop%2Ffront"),
        "far-2": ("amqps", "[2001:db8::1]:5673", "/shop%2Ffront"),
        "stream": ("nats", "nats.example:4222", None),
        "cloud": ("googlepubsub", "pubsub.googleapis.com:443", None),
    }
    assert not re.search("hunter2|reader", json.dumps(made))
    assert {name: channel["address"] for name, channel in made["channels"].items()} == {
        "far.a.b": "a.b",
        "stream.a.b": "events.a.b",
        "cloud.events": "projects/my-project/topics/events",
    }
    [operation] = [one for name, one in made["operations"].items() if name == "send.far.a.b"]
    assert (operation["action"], operation["channel"]) == ("send", {"$ref": "#/channels/far.a.b"})


async def test_routes_decide_what_is_where_and_what_none_takes_is_said(bridge_database: str, tmp_path: Path) -> None:
    await execute(
        bridge_database,
        "select bridge.register_schema(t, '{}') from unnest(array['shop.a', 'shop.b', 'other']) t",
    )
    text = settings(bridge_database, EVERY_KIND, ("shop.*", "far"), ("*.b", "stream"), ("nothing", "cloud"))
    out, _ = await run(
        tmp_path, text, "--format", "json", said="pgbridge: no route takes the topic 'other', so it is left out\n"
    )
    made = json.loads(out)
    assert list(made["channels"]) == ["far.shop.a", "far.shop.b", "stream.shop.b"]
    assert "topic.other" not in made["components"]["schemas"]


async def test_a_broker_that_does_not_describe_itself_is_left_out(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, "select bridge.register_schema('a', '{}')")
    sinks = f'[sinks.here]\ntype = "memory"\n{RABBITMQ}'
    said = "pgbridge: sinks.here: a broker of type 'memory' does not describe itself, so it is left out\n"
    out, _ = await run(tmp_path, settings(bridge_database, sinks), said=said)
    assert list(yaml.safe_load(out)["channels"]) == ["far.a"]


async def test_without_a_schema_it_knows_of_channels(database: str, tmp_path: Path) -> None:
    text = settings(database, RABBITMQ, more='channels = {listen = ["a b"], buffer = "memory"}')
    [channel] = (await document(tmp_path, text))["channels"].values()
    [message] = channel["messages"].values()
    assert (channel["address"], message["contentType"], message["payload"]) == ("a b", "text/plain", {"type": "string"})


async def test_a_registered_schema_leads_into_itself_wherever_it_stands(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, "select bridge.register_schema('shop.order.placed', %s, 'An order.')", PLACED)
    made = await document(tmp_path, settings(bridge_database, RABBITMQ))
    [message] = made["channels"]["far.shop.order.placed"]["messages"].values()
    assert (message["description"], message["contentType"]) == ("An order.", "application/json")
    assert faults(made, message["payload"], {"order": 1, "total": "5 EUR", "parts": [{"total": "1 EUR"}]}) == []
    assert faults(made, message["payload"], {"total": "5"})
    assert faults(made, message["payload"], {"parts": [{"order": "1"}]})
    assert list(made["components"]["schemas"]["topic.shop.order.placed"]["properties"]) == ["order", "total", "parts"]


_WORDS: Final = (
    *(
        "type",
        "properties",
        "patternProperties",
        "definitions",
        "dependencies",
        "items",
        "additionalItems",
        "not",
        "if",
    ),
    *("additionalProperties", "contains", "propertyNames", "allOf", "anyOf", "oneOf", "required", "examples", "title"),
    *("minLength", "maxItems", "minProperties", "minimum", "multipleOf", "uniqueItems", "readOnly", "const", "default"),
)
_LEAVES: Final = strategies.sampled_from(
    [None, True, False, 0, 1, -1, 2.0, 0.5, "", "a", "string", "integer", "any"]
) | strategies.lists(strategies.sampled_from(["string", "null", "a", "b", 1, True]), max_size=3)
_SCHEMAS: Final = strategies.recursive(
    strategies.dictionaries(strategies.sampled_from(_WORDS), _LEAVES, max_size=2),
    lambda inner: strategies.dictionaries(
        strategies.sampled_from(_WORDS),
        inner | strategies.lists(inner, max_size=2) | strategies.dictionaries(strategies.just("a"), inner | _LEAVES),
        max_size=2,
    ),
    max_leaves=6,
)


def test_what_can_be_registered_is_what_the_schema_of_json_schema_takes(bridge_database: str) -> None:
    metaschema = Draft7Validator(Draft7Validator.META_SCHEMA)
    with psycopg.connect(bridge_database, autocommit=True) as connection:

        @hypothesis.settings(max_examples=300)
        @hypothesis.given(_SCHEMAS)
        def compare(schema: dict[str, Any]) -> None:
            [(fault,)] = connection.execute("select bridge.json_schema_fault(%s, '#')", [Jsonb(schema)])
            assert (fault is None) is metaschema.is_valid(schema), (schema, fault)

        compare()


async def test_topics_that_look_alike_and_tables_that_share_one_stay_apart(
    bridge_database: str, tmp_path: Path
) -> None:
    await execute(bridge_database, "create table a (id int primary key); create table b (id text primary key)")
    await execute(
        bridge_database, "select bridge.watch('a', 'same'), bridge.watch('b', 'same', operations => '{insert}')"
    )
    await execute(
        bridge_database,
        "select bridge.register_schema(t, '{}') from unnest(array['same', 'a b', 'a_b', 'a/b', '{x}']) t",
    )
    made = await document(tmp_path, settings(bridge_database, RABBITMQ))
    assert list(made["channels"]["far.same"]["messages"]) == [
        "public.a.insert", "public.a.update", "public.a.delete", "public.b.insert", "public.a.read", "public.b.read",
        "topic.same",
    ]  # fmt: skip
    addresses = {channel["title"]: channel["address"] for channel in made["channels"].values()}
    # Braces would hold the name of a parameter.
    assert [channel["x-address"] for channel in made["channels"].values() if channel["address"] is None] == ["{x}"]
    assert addresses == {"same": "same", "a b": "a b", "a_b": "a_b", "a/b": "a/b", "{x}": None}


async def test_the_same_database_gives_the_same_document_and_a_change_another_version(
    bridge_database: str, tmp_path: Path
) -> None:
    await execute(bridge_database, "create table t (id int primary key); select bridge.watch('t')")
    text = settings(bridge_database, RABBITMQ)
    first = await document(tmp_path, text)
    assert await document(tmp_path, text) == first
    await execute(bridge_database, "alter table t add v int")
    assert (await document(tmp_path, text))["info"]["version"] != first["info"]["version"]

    target = tmp_path / "events.json"
    out, _ = await run(
        tmp_path, text, "--output", str(target), "--title", "Shop", "--doc-version", "2.1", said=f"wrote {target}\n"
    )
    assert out == ""
    info = json.loads(target.read_text())["info"]
    assert (info["title"], info["version"]) == ("Shop", "2.1")
    _, words = await run(tmp_path, text, "--output", "/proc/none/events.yaml", expect=2, said=None)
    assert words == "pgbridge: --output: /proc/none/events.yaml cannot be written: No such file or directory\n"


@pytest.mark.parametrize(("role", "may"), [("operator", True), ("relay", True), ("worker", False), ("emitter", False)])
async def test_whoever_may_see_the_status_may_write_the_document(
    bridge_database: str, tmp_path: Path, unique: str, role: str, may: bool
) -> None:
    await execute(
        bridge_database, "create table t (id int primary key); revoke all on t from public; select bridge.watch('t')"
    )
    await execute(
        bridge_database, f"create role {unique} login in role bridge_{role}; select bridge.register_schema('x', '{{}}')"
    )
    try:
        text = settings(make_conninfo(bridge_database, user=unique), RABBITMQ)
        out, words = await run(tmp_path, text, expect=0 if may else 69, said="" if may else None)
        if may:
            assert list(yaml.safe_load(out)["channels"]) == [
                "far.public.t.deleted", "far.public.t.inserted", "far.public.t.read", "far.public.t.updated", "far.x",
            ]  # fmt: skip
        else:
            assert "postgres.dsn: permission denied for function watches" in words
    finally:
        await execute(bridge_database, f"drop role {unique}")


async def test_tables_of_which_it_is_not_known_how_they_are_watched_are_named(
    bridge_database: str, tmp_path: Path
) -> None:
    text = settings(bridge_database, RABBITMQ)
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute(
            'create table t (id int primary key, v int); create table "it\'s" (id int primary key, v int)'
        )
        connection.execute("select bridge.watch('t'), bridge.watch('\"it''s\"')")
        rows = connection.execute(
            "select watched::regclass::text, capture from bridge.watches() where operation = 'insert'"
        )
        captures: dict[str, str] = dict(rows.fetchall())
        forget = sql.SQL("comment on function bridge.{}() is null")
        connection.execute(forget.format(sql.Identifier(captures['"it\'s"'])))
        _, words = await run(tmp_path, text, expect=69, said=None)
        assert words == (
            'pgbridge: postgres.dsn: public."it\'s": watched by an older version, which did not write down how. '
            "Watch again, with the topic, key and columns that are wanted: select bridge.watch('public.\"it''s\"')\n"
        )
        connection.execute("select bridge.unwatch('\"it''s\"')")

        connection.execute("alter table t rename v to w")
        connection.execute("select bridge.watch('t', columns => '{w}')")
        connection.execute("alter table t rename w to v")
        _, words = await run(tmp_path, text, expect=69, said=None)
        assert "bridge.watch() was told of the column w, which public.t no longer has. Watch the table again" in words


async def test_the_page_shows_what_the_command_writes(bridge_database: str, tmp_path: Path, unique: str) -> None:
    page = (ROOT / "docs" / "asyncapi.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    await execute(bridge_database, "create schema shop")
    for statements in [text for kind, text in blocks if kind == "sql"]:
        await execute(bridge_database, statements)
    sink = '[sinks.events]\ntype = "rabbitmq"\nurl = "amqps://bridge:secret@mq.internal/shop"'
    out, _ = await run(tmp_path, settings(bridge_database, sink))
    shown = [text for kind, text in blocks if kind == "yaml"]
    assert len(shown) == 4
    for text in shown:
        assert text in out
