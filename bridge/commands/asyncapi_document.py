"""What a database and the settings of its bridge say, as a document of AsyncAPI 3.0.

A channel is where one sink sends a topic; its messages are what can come there. The same database and settings give the
same document, byte for byte, so that a change of it is a change of what consumers get.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bridge.brokers.description import Channel, DescribedBroker, Description, Json
from bridge.brokers.registry import broker_of
from bridge.event import REPLAYED, SPECVERSION, TRACEPARENT
from bridge.postgres.emitted import Emitted, Operation, RegisteredSchema, Watch
from bridge.postgres.json_types import is_nullable, row_schema
from bridge.routes import Routes
from bridge.settings import Settings

ASYNCAPI: Final = "3.0.0"

UNSAYABLE_ADDRESS: Final = "x-address"
"""Under which a channel has an address that AsyncAPI has no way to write."""

_JSON: Final = "application/json"
_TEXT: Final = "text/plain"

_INFO: Final = """\
The events that the bridge `{name}` carries from the database `{database}` to message queues, as they are committed.

Messages are CloudEvents 1.0 in binary mode: the body is the payload, and everything else is in headers. A message \
may come twice, with the same id. Events of one key come in the order of their commits. New columns, headers and \
topics may come at any time, so what a consumer does not know it passes over.\
"""

_SAID: Final[Mapping[Operation, str]] = {
    "insert": "A row was inserted into {}.",
    "update": "A row of {} was changed.",
    "delete": "A row of {} was deleted.",
    "read": "A row that is in {}, when somebody asks for those that are there (`pgbridge backfill`).",
}


@dataclass(frozen=True, slots=True)
class _Message:
    """One form that events of a topic have, whichever broker carries them."""

    name: str
    title: str
    summary: str
    description: str
    content_type: str
    payload: Json
    key: Json | None
    """The schema of the key; None where nothing is known of it."""
    always_keyed: bool
    headers: Json = field(default_factory=dict)
    """Schemas of headers that only these events have."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document, and what is not in it."""

    content: Json
    left_out: Sequence[str]
    """Sentences for a person."""


def document(
    settings: Settings, database: str, emitted: Emitted, *, title: str | None = None, version: str | None = None
) -> Document:
    """The document of one bridge. `version`: its own; left out, it is made of what the document says, so that it
    changes when that does. Raises SettingsError for a sink whose broker is not installed."""
    schemas: Json = {}
    messages = _messages(settings, emitted, schemas)
    routes = Routes([(route.topic, route.sink) for route in settings.routes])
    sent = {topic: routes.sinks_of(topic) for topic in sorted(messages)}
    left_out = [f"no route takes the topic {topic!r}, so it is left out" for topic, sinks in sent.items() if not sinks]
    servers: Json = {}
    channels: Json = {}
    operations: Json = {}
    for sink, sink_settings in settings.sinks.items():
        topics = [topic for topic, sinks in sent.items() if sink in sinks]
        broker = broker_of(sink_settings)
        if not isinstance(broker, DescribedBroker):
            left_out.append(
                f"sinks.{sink}: a broker of type {sink_settings.type!r} does not describe itself, so it is left out"
            )
            continue
        description = broker.description(sink_settings)
        own_servers = _servers(sink, description)
        servers |= own_servers
        schemas |= _common_headers(sink, description, f"/{database}/{settings.name}") if topics else {}
        for topic in topics:
            channel = description.channel(topic)
            name = f"{sink}.{identifier(channel.name)}"
            if name not in channels:
                channels[name] = _channel(sink, channel, description, list(own_servers))
                operations[f"send.{name}"] = _operation(name, description)
            channels[name]["messages"] |= {
                message.name: _message(sink, topic, message, description) for message in messages[topic]
            }
    info = {"title": title or f"Events of {settings.name}", "version": version or ""}
    info["description"] = _INFO.format(name=settings.name, database=database)
    content = {
        "asyncapi": ASYNCAPI,
        "info": info,
        "defaultContentType": _JSON,
        "servers": servers,
        "channels": channels,
        "operations": operations,
        "components": {"schemas": _used(schemas, channels)},
    }
    if version is None:
        info["version"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    return Document(content, left_out)


def identifier(*parts: str) -> str:
    """A name that AsyncAPI, JSON pointers and generators of code take. Other characters are replaced, also dots in one
    of several parts, and a hash keeps apart what that would make alike."""
    other = r"[^A-Za-z0-9_-]" if len(parts) > 1 else r"[^A-Za-z0-9_.-]"
    plain = ".".join(re.sub(other, "_", part) for part in parts)
    if plain == ".".join(parts):
        return plain
    return f"{plain}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


# Messages -------------------------------------------------------------------------------------------------------------


def _messages(settings: Settings, emitted: Emitted, schemas: Json) -> Mapping[str, Sequence[_Message]]:
    """By topic; the schemas of their payloads are added to `schemas`."""
    found: dict[str, list[_Message]] = {}
    for watch in emitted.watches:
        found.setdefault(watch.topic, []).append(_of_table(watch, emitted, schemas))
    for registered in emitted.registered:
        found.setdefault(registered.topic, []).append(_by_hand(registered, schemas))
    for channel in settings.channels.listen if settings.channels else ():
        if all(message.content_type != _TEXT for message in found.get(channel, ())):
            found.setdefault(channel, []).append(_notification(channel))
    return found


def _of_table(watch: Watch, emitted: Emitted, schemas: Json) -> _Message:
    table = watch.table
    row = identifier("row", table.schema, table.name)
    schemas[row] = row_schema(table, watch.columns, emitted.types)
    name = identifier("event", table.schema, table.name, watch.operation)
    schemas[name] = _payload(watch, _schema_ref(row))
    return _Message(
        name=name.removeprefix("event."),
        title=f"{table}: {watch.operation}",
        summary=_SAID[watch.operation].format(table),
        description=table.comment or "",
        content_type=_JSON,
        payload=_schema_ref(name),
        key={"type": "string", "description": _key_said(watch.keys)},
        # That of several columns is an array, which is there although they are null.
        always_keyed=len(watch.keys) > 1 or not is_nullable(table.fields[watch.keys[0]], emitted.types),
        headers=_BACKFILL if watch.operation == "read" else {},
    )


_BACKFILL: Final = {"backfill": {"type": "string", "pattern": "^[0-9]+$", "description": "The number of the backfill."}}


def _payload(watch: Watch, row: Json) -> Json:
    parts = {
        "operation": {"const": watch.operation},
        "schema": {"const": watch.table.schema},
        "table": {"const": watch.table.name},
        "new": {"type": "null"} if watch.operation == "delete" else row,
        "old": row if watch.operation in ("update", "delete") else {"type": "null"},
    }
    return {"type": "object", "properties": parts, "required": list(parts)}


def _key_said(keys: Sequence[str]) -> str:
    if len(keys) == 1:
        return f"The key: the column {keys[0]}, as text."
    return f"The key: the columns {', '.join(keys)}, as the text of a JSON array."


def _by_hand(registered: RegisteredSchema, schemas: Json) -> _Message:
    name = f"topic.{identifier(registered.topic)}"
    schemas[name] = _moved(
        {word: held for word, held in registered.schema.items() if word not in ("$schema", "$id")},
        f"#/components/schemas/{name}",
    )
    return _Message(
        name=name,
        title=registered.topic,
        summary=f"An event of {registered.topic}.",
        description=registered.description,
        content_type=registered.content_type,
        payload=_schema_ref(name),
        key=None,
        always_keyed=False,
    )


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references into itself lead to where it is now."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        word: to + held.removeprefix("#") if word == "$ref" and isinstance(held, str) else _moved(held, to)
        for word, held in schema.items()
    }


def _notification(channel: str) -> _Message:
    return _Message(
        name=f"notification.{identifier(channel)}",
        title=channel,
        summary=f"What pg_notify() sent to the channel {channel}.",
        description="",
        content_type=_TEXT,
        payload={"type": "string"},
        key={"type": "string", "const": channel, "description": "The key: the channel."},
        always_keyed=True,
    )


# Brokers --------------------------------------------------------------------------------------------------------------


def _servers(sink: str, description: Description) -> Json:
    found = {}
    for number, server in enumerate(description.servers, 1):
        name = sink if len(description.servers) == 1 else f"{sink}-{number}"
        about = {
            "host": server.host,
            "protocol": server.protocol,
            "protocolVersion": server.version,
            "pathname": server.pathname,
            "description": description.words,
        }
        found[name] = {word: text for word, text in about.items() if text is not None}
    return found


def _channel(sink: str, channel: Channel, description: Description, servers: Sequence[str]) -> Json:
    # In an address braces hold the name of a parameter, and no others can be written.
    sayable = re.search(r"[{}]", channel.address) is None
    content = {
        "address": channel.address if sayable else None,
        UNSAYABLE_ADDRESS: None if sayable else channel.address,
        "title": channel.name,
        "servers": [{"$ref": f"#/servers/{name}"} for name in servers],
        "messages": {},
        "bindings": channel.bindings,
    }
    return {word: held for word, held in content.items() if held or word in ("address", "messages")}


def _operation(channel: str, description: Description) -> Json:
    content = {"action": "send", "channel": {"$ref": f"#/channels/{channel}"}, "bindings": description.bindings}
    return {word: held for word, held in content.items() if held}


def _common_headers(sink: str, description: Description, source: str) -> Json:
    """The schema of what all messages of a sink have among their headers."""
    prefix = description.prefix
    always = {
        f"{prefix}specversion": {"const": SPECVERSION},
        f"{prefix}id": {
            "type": "string",
            "format": "uuid",
            "description": "The same for ever, also when it comes again.",
        },
        f"{prefix}source": {"const": description.written(source)},
        f"{prefix}time": {"type": "string", "format": "date-time", "description": "When the event was recorded."},
    }
    sometimes = {
        TRACEPARENT: {"type": "string", "description": "The trace that the event belongs to (W3C Trace Context)."},
        "actor": {"type": "string", "description": "Who caused the event, where that is known."},
        REPLAYED: {"type": "string", "format": "uuid", "description": "Which replay brought it."},
        **description.headers,
    }
    schema = {"type": "object", "properties": {**always, **sometimes}, "required": list(always)}
    return {_headers_of(sink): schema}


def _headers_of(sink: str) -> str:
    return f"headers.{sink}"


def _message(sink: str, topic: str, message: _Message, description: Description) -> Json:
    type_name, key_name = f"{description.prefix}type", f"{description.prefix}subject"
    properties: Json = {type_name: {"const": description.written(topic)}}
    required = [type_name]
    if description.content_type is not None:
        properties[description.content_type] = {"const": message.content_type}
        required.append(description.content_type)
    if message.key is not None:
        key = dict(message.key)
        if "const" in key:
            key["const"] = description.written(key["const"])
        properties[key_name] = key
        required += [key_name] if message.always_keyed else []
    else:
        properties[key_name] = {"type": "string", "description": "The key, where it has one."}
    headers = {
        "type": "object",
        "allOf": [_schema_ref(_headers_of(sink))],
        "properties": properties | message.headers,
        "required": required,
    }
    content = {
        "name": message.name,
        "title": message.title,
        "summary": message.summary,
        "description": message.description,
        "contentType": message.content_type,
        "headers": headers,
        "payload": message.payload,
    }
    return {word: held for word, held in content.items() if held}


def _schema_ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _used(schemas: Json, channels: Json) -> Json:
    """Those schemas to which something leads."""
    wanted, waiting = set(), list(_names_in(channels))
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += _names_in(schemas[name])
    return {name: schema for name, schema in sorted(schemas.items()) if name in wanted}


def _names_in(content: Any) -> Iterable[str]:
    if isinstance(content, dict):
        target = content.get("$ref")
        if isinstance(target, str) and (found := re.match(r"#/components/schemas/([^/]+)", target)):
            yield found[1]
        for held in content.values():
            yield from _names_in(held)
    elif isinstance(content, list):
        for held in content:
            yield from _names_in(held)
