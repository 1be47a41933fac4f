"""Writes docs/settings.md and docs/bridge.schema.json from the models, so that they cannot differ.

python -m bridge.settings.document docs
"""

import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bridge.settings.installed import points
from bridge.settings.models import (
    ConsoleSettings,
    PostgresSettings,
    Settings,
    SinkSettings,
    is_secret,
    parse_duration,
    parse_folders,
    parse_size,
)

_INTRODUCTION: Final = """\
# Settings

One file, `bridge.toml`, serves bridge and workers: `--config`, or `$PGBRIDGE_CONFIG`, or `./bridge.toml`, or
`/etc/pgbridge/bridge.toml`. More places override it, the later ones winning:

- **The units' credentials**, for commands outside of systemd: a file `credentials/bridge/sinks.events.url` (or
  `credentials/workers/...`, and for the console `credentials/console/...`) beside the settings sets `sinks.events.url`,
  as it does for the unit's process.
- **Environment**: `PGBRIDGE_POSTGRES__DSN` is `postgres.dsn`; two underscores are a dot. Lists are written as in
  TOML: `PGBRIDGE_CHANNELS__LISTEN='["orders", "stock"]'`.
- **Secret files**: a key marked *secret* may be given as `<key>_file`, the path of a file that holds it.
- **Credentials**: files of the same names in `$CREDENTIALS_DIRECTORY`, which systemd fills by
  `LoadCredential=bridge:/etc/pgbridge/credentials/bridge`, or in the folder that a command is given by `--credentials`.

Unknown keys are errors. `pgbridge check` and every start validate all of it. Durations are written `"500ms"`, `"30s"`,
`"5m"`, `"2h"`, `"7d"`; sizes `"64MB"`, `"16MiB"`. Editors that know JSON Schema can use
[bridge.schema.json](bridge.schema.json).

This page is generated from the models in `bridge/settings/`: `make docs`.
"""

_WORKERS: Final = """\
## `[workers]`

| key | type | default | meaning |
|---|---|---|---|
| `dsn` | secret | none | Where the workers find the database, with a login of their own. Left out: `postgres.dsn` |
"""


def sink_models() -> dict[str, type[SinkSettings]]:
    """The settings' model of every sink that is installed, by type."""
    return {point.name: point.load().settings for point in sorted(points("pgbridge.brokers"))}


def settings_page() -> str:
    """docs/settings.md."""
    parts = [_INTRODUCTION, _section("Top level", "", Settings)]
    for name, field in Settings.model_fields.items():
        model = _model_in(field.annotation)
        if model is SinkSettings:
            for kind, sink in sink_models().items():
                parts.append(_section(f'`[sinks.<name>]` with `type = "{kind}"`', "", sink))
        elif model is not None:
            table = f"[[{name}]]" if _is_in(list, field.annotation) else f"[{name}]"
            if name == "workers":
                parts.append(_WORKERS)
            table = "[workers.<name>]" if name == "workers" else table
            parts.append(_section(f"`{table}`", field.description or "", model))
    return "\n".join(parts)


def json_schema() -> str:
    """docs/bridge.schema.json: every installed sink is one of the alternatives under `sinks`."""
    schema = Settings.model_json_schema()
    definitions = schema["$defs"]
    definitions.pop("SinkSettings", None)
    kinds = []
    for kind, model in sink_models().items():
        sink = model.model_json_schema()
        definitions.update(sink.pop("$defs", {}))
        sink["properties"]["type"] = {"const": kind, "description": "The kind of broker."}
        _add_secret_files(sink, model)
        definitions[f"Sink_{kind}"] = sink
        kinds.append({"$ref": f"#/$defs/Sink_{kind}"})
    schema["properties"]["sinks"]["additionalProperties"] = {"oneOf": kinds}
    for table in (PostgresSettings, ConsoleSettings):
        _add_secret_files(definitions[table.__name__], table)
    del schema["properties"]["workers_login"]
    schema["properties"]["workers"]["properties"] = {
        "dsn": {"type": "string", "description": "The workers' own login at the database."},
        "dsn_file": {"type": "string", "description": "A file that holds `dsn`."},
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _add_secret_files(schema: dict[str, Any], model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if is_secret(field.annotation):
            schema["properties"][f"{name}_file"] = {"type": "string", "description": f"A file that holds `{name}`."}
            if name in schema.get("required", []):
                schema["required"].remove(name)


def _section(title: str, meaning: str, model: type[BaseModel]) -> str:
    rows = "\n".join(_rows(model, ""))
    lead = f"{meaning}\n\n" if meaning else ""
    return f"## {title}\n\n{lead}| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name == "workers_login":  # written as workers.dsn
            continue
        nested = _model_in(field.annotation)
        if nested is not None and (model is Settings or _is_in(dict, field.annotation)):
            continue
        if nested is not None:
            yield from _rows(nested, f"{prefix}{name}.")
            continue
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_kind(field)} | {_default(field)} | {meaning} |"


def _is_in(container: type, annotation: Any) -> bool:
    """Whether a field holds such a container, itself or inside of another or an optional."""
    return typing.get_origin(annotation) is container or any(
        _is_in(container, part) for part in typing.get_args(annotation)
    )


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, itself or inside of a list, dict or optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in reversed(typing.get_args(annotation)):
        if (found := _model_in(argument)) is not None:
            return found
    return None


def _kind(field: FieldInfo) -> str:
    validators = {getattr(part, "func", None) for part in field.metadata}
    if parse_duration in validators:
        return "duration"
    if parse_size in validators:
        return "size"
    if parse_folders in validators:
        return "path or list of paths"
    annotation = field.annotation
    if is_secret(annotation):
        return "secret"
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    names: dict[Any, str] = {
        str: "text",
        int: "number",
        float: "number",
        bool: "true or false",
        Path: "path",
        dict: "table",
    }
    if typing.get_origin(annotation) is list:
        return "list of texts"
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
        annotation = typing.get_origin(annotation) or annotation
    if typing.get_origin(annotation) in (typing.Annotated, dict):
        annotation = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else dict
    return names.get(annotation, "text")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "*required*"
    default = field.get_default(call_default_factory=True, validated_data={})
    kind = _kind(field)
    if default is None or default in ("", [], {}) or isinstance(default, SecretStr):
        return "none"
    if kind == "duration":
        return f"`{_as_duration(default)}`"
    if kind == "size":
        return f"`{default / 1_000_000:g}MB`" if default >= 1_000_000 else f"`{default}B`"
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default}`"


def _as_duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds * 1000:g}ms"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "settings.md").write_text(settings_page(), encoding="utf-8")
    (folder / "bridge.schema.json").write_text(json_schema(), encoding="utf-8")
