"""CloudEvents in structured mode: the JSON event format (1.0.2), taken apart into what binary mode would carry.

The bridge writes none; other programs do. The text of `data` is handed on as it was sent, so that no number loses a
digit; what its value is, remains the handler's matter, as in binary mode.
"""

import base64
import re
from collections.abc import Iterator
from json import JSONDecoder
from typing import Any, Final, NamedTuple, NoReturn

MEDIA_TYPE: Final = "application/cloudevents"
"""Begins the content type of every message in structured mode, in any case."""

_FORMATS: Final = (MEDIA_TYPE, f"{MEDIA_TYPE}+json")
_BATCH: Final = f"{MEDIA_TYPE}-batch"
_CHARSET: Final = re.compile(r""";\s*charset\s*=\s*["']?([^\s;"']+)""", re.IGNORECASE)
_LONGEST_ATTRIBUTE: Final = 65_536
"""Characters; more than any broker carries beside a payload."""
_SPACE: Final = re.compile(r"[ \t\r\n]*")


class Parts(NamedTuple):
    """What binary mode would carry."""

    attributes: dict[str, str]
    """By their names without a prefix; but for `datacontenttype`."""
    data: bytes
    content_type: str


def take_apart(document: bytes, content_type: str) -> Parts:
    """The attributes and the data of an event. Raises ValueError, saying what is wrong, for whatever is none."""
    essence = _essence(content_type)
    if essence.startswith(_BATCH):
        raise ValueError("it is a batch; publish every event as a message of its own")
    if essence not in _FORMATS:
        raise ValueError(f"its format {essence[:80]!r} is not read; {_FORMATS[1]} is")
    _require_utf8(content_type)
    attributes: dict[str, str] = {}
    data: dict[str, tuple[Any, str]] = {}
    seen = set()
    for name, value, text in _members(document.decode()):
        if name in seen:
            raise ValueError(f"its member {name[:80]!r} is there twice")
        seen.add(name)
        if name == "data":
            data[name] = value, text
        elif value is None:
            continue  # not set
        elif name == "data_base64":
            data[name] = value, text
        else:
            attributes[name] = _attribute(name, value, text)
    declared = attributes.pop("datacontenttype", None)
    if len(data) == 2:
        raise ValueError("it has both data and data_base64")
    if "data_base64" in data:
        return Parts(attributes, _binary(data["data_base64"][0]), declared or "application/octet-stream")
    content = _content(*data["data"], declared) if data else b""
    return Parts(attributes, content, declared or "application/json")


def _essence(content_type: str) -> str:
    """A content type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def _require_utf8(content_type: str) -> None:
    found = _CHARSET.search(content_type)
    if found and found[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ValueError(f"the charset {found[1][:80]!r} is not read; UTF-8 is")


def _members(text: str) -> Iterator[tuple[str, Any, str]]:
    """Name, value and the value's own text of every member of a JSON object. Raises ValueError for anything else."""
    position = _past_space(text, 0)
    if not text.startswith("{", position):
        raise ValueError("it is not a JSON object")
    position = _past_space(text, position + 1)
    more = not text.startswith("}", position)
    while more:
        if not text.startswith('"', position):
            raise ValueError(f"the name of a member is wanted at character {position}")
        name, position = _value_at(text, position)
        position = _past_space(text, position)
        if not text.startswith(":", position):
            raise ValueError(f"a colon is wanted at character {position}")
        start = _past_space(text, position + 1)
        value, end = _value_at(text, start)
        yield name, value, text[start:end]
        position = _past_space(text, end)
        more = text.startswith(",", position)
        if more:
            position = _past_space(text, position + 1)
    if not text.startswith("}", position):
        raise ValueError(f"a comma or the object's end is wanted at character {position}")
    if _past_space(text, position + 1) != len(text):
        raise ValueError(f"something follows the object's end at character {position}")


def _past_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _value_at(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError:
        raise ValueError(f"it is nested too deeply at character {position}") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


_DECODER: Final = JSONDecoder(parse_constant=_no_number)


def _attribute(name: str, value: object, text: str) -> str:
    """The canonical text of an attribute's value."""
    match value:
        case str():
            if len(value) > _LONGEST_ATTRIBUTE:
                raise ValueError(
                    f"the attribute {name[:80]!r} has {len(value)} characters; {_LONGEST_ATTRIBUTE} are read"
                )
            (name + value).encode()  # raises for a lone surrogate, which no text that travels may hold
            return value
        case bool() | int():
            return text
    raise ValueError(f"the attribute {name[:80]!r} is neither text nor a whole number nor true or false")


def _content(value: object, text: str, content_type: str | None) -> bytes:
    """What `data` stands for: JSON as it was sent, or a text of another type."""
    subtype = _essence(content_type).rpartition("/")[2] if content_type else "json"
    if subtype == "json" or subtype.endswith("+json"):
        return text.encode()
    _require_utf8(content_type or "")
    match value:
        case str():
            return value.encode()
    raise ValueError(f"data is no text although datacontenttype, {content_type!r:.80}, is not JSON")


def _binary(value: object) -> bytes:
    match value:
        case str():
            return base64.b64decode(value, validate=True)
    raise ValueError("data_base64 is no text")
