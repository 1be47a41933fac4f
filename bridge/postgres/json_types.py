"""PostgreSQL's types as JSON Schema (draft-07): what to_jsonb() makes of a value, as events of watched tables have it.

Each schema takes every value that a column of the type can hold: a timestamp is also `infinity`, and `NaN` is no number
in JSON. What a session decides (`bytea_output`, `IntervalStyle`, `TimeZone`, `lc_monetary`) narrows no schema.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from bridge.postgres.emitted import FIRST_OID, Field, Table, Type

JsonSchema = dict[str, Any]

DECLARED: Final = "x-postgresql-type"
"""The keyword under which a column's schema has its type in SQL."""

_NOT_FINITE: Final = r"^(NaN|-?Infinity)$"
_DAY: Final = r"[0-9]{4,}-[0-9]{2}-[0-9]{2}"
_TIME: Final = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
_OFFSET: Final = r"[+-][0-9]{2}(:[0-9]{2}){0,2}"

_BUILT_IN: Final[Mapping[str, JsonSchema]] = {
    "boolean": {"type": "boolean"},
    "smallint": {"type": "integer", "minimum": -(2**15), "maximum": 2**15 - 1},
    "integer": {"type": "integer", "format": "int32", "minimum": -(2**31), "maximum": 2**31 - 1},
    "bigint": {"type": "integer", "format": "int64"},
    "real": {"type": ["number", "string"], "pattern": _NOT_FINITE},
    "double precision": {"type": ["number", "string"], "pattern": _NOT_FINITE},
    "numeric": {"type": ["number", "string"], "pattern": _NOT_FINITE},
    "json": {},
    "jsonb": {},
    "uuid": {"type": "string", "format": "uuid"},
    "date": {"type": "string", "anyOf": [{"format": "date"}, {"pattern": rf"^-?infinity$|^{_DAY} BC$|^[0-9]{{5,}}-"}]},
    "timestamp without time zone": {"type": "string", "pattern": rf"^({_DAY}T{_TIME}( BC)?|-?infinity)$"},
    "timestamp with time zone": {
        "type": "string",
        # Offsets with seconds are those of the time before there were zones.
        "anyOf": [
            {"format": "date-time"},
            {"pattern": r"^-?infinity$| BC$|^[0-9]{5,}-|[+-][0-9]{2}:[0-9]{2}:[0-9]{2}$"},
        ],
    },
    "time without time zone": {"type": "string", "pattern": rf"^{_TIME}$"},
    "time with time zone": {"type": "string", "pattern": rf"^{_TIME}{_OFFSET}$"},
    "bit": {"type": "string", "pattern": "^[01]*$"},
    "bit varying": {"type": "string", "pattern": "^[01]*$"},
}
"""By the name in SQL; every other type of PostgreSQL's is a string, as it is written."""

_WITH_LENGTH: Final = {"character varying": 4, "character": 4, "bit": 0, "bit varying": 0}
"""Types whose typmod is the most characters, and how much it is more than that."""


def row_schema(table: Table, columns: Iterable[str], types: Mapping[int, Type]) -> JsonSchema:
    """A row, or the watched columns of it."""
    schema = _object([table.fields[name] for name in columns], types)
    return schema if table.comment is None else {"description": table.comment, **schema}


def _object(fields: Iterable[Field], types: Mapping[int, Type]) -> JsonSchema:
    properties = {}
    for field in fields:
        schema = _value(types[field.type], field.typmod, field.dimensions, types)
        if is_nullable(field, types):
            schema = _or_null(schema)
        said = {"description": field.comment} if field.comment else {}
        properties[field.name] = {**schema, **said, DECLARED: field.declared}
    return {"type": "object", "properties": properties, "required": list(properties)}


def is_nullable(field: Field, types: Mapping[int, Type]) -> bool:
    """Whether a column may be null."""
    kind = types[field.type]
    while kind.kind == "d" and not kind.not_null:
        kind = types[kind.base]
    return field.nullable and not kind.not_null


def _or_null(schema: JsonSchema) -> JsonSchema:
    if "type" not in schema:
        return schema
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    values = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, "type": [*kinds, "null"], **values}


def _value(kind: Type, typmod: int, dimensions: int, types: Mapping[int, Type]) -> JsonSchema:
    """What to_jsonb() makes of a value that is not null. It looks through domains, and then for an array or a composite
    type before it looks for a cast."""
    if kind.kind == "d":
        below = _value(types[kind.base], kind.typmod, kind.dimensions, types)
        about = [*([kind.comment] if kind.comment else []), *(f"{kind.name}: {check}" for check in kind.checks)]
        return {**below, **({"description": "\n".join(about)} if about else {})}
    if kind.element:
        # An element may be null, and PostgreSQL holds nobody to the dimensions that were declared.
        schema = _or_null(_value(types[kind.element], typmod, 0, types))
        for _ in range(max(dimensions, 1)):
            schema = {"type": "array", "items": schema}
        return schema
    if kind.kind == "c":
        return _object(kind.fields, types)
    if kind.own_json:
        return {}
    if kind.kind == "e":
        return {"type": "string", "enum": list(kind.labels)}
    if kind.oid >= FIRST_OID:
        return {"type": "string"}
    schema = dict(_BUILT_IN.get(kind.name, {"type": "string"}))
    more = _WITH_LENGTH.get(kind.name)
    if more is not None and typmod > more:
        schema["maxLength"] = typmod - more
    return schema
