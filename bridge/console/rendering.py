"""Templates. What stands in them is markup; whatever they are given is text, with its control characters visible."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bridge import __version__
from bridge.console.chart import told
from bridge.console.reader import COUNTED
from bridge.postgres.problems import problem_words
from bridge.process.terminal import age
from bridge.process.visible import visible


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _size(number: int) -> str:
    """Bytes as `pgbridge status` shows them."""
    return f"{number / 1e6:,.1f} MB"


def _bytes(number: int) -> str:
    """Bytes of what may be small."""
    return f"{number / 1e3:,.0f} kB" if number < 1e6 else _size(number)


def _rate(number: float | None) -> str:
    """Times a second; what is seldom is not none."""
    if number is None:
        return "–"
    return f"{number:,.0f}/s" if number >= 100 else told(number, "events/s")


def _duration(seconds: float | None) -> str:
    """What may take milliseconds."""
    return "–" if seconds is None else told(seconds, "seconds")


def _ago(at: datetime | None, now: datetime) -> str:
    """How long before `now` it was."""
    return "–" if at is None else age(max(0.0, (now - at).total_seconds()))


def _when(at: datetime | None) -> str:
    """A time in UTC, which the script shows in the reader's zone."""
    if at is None:
        return "–"
    return Markup('<time datetime="{}">{} UTC</time>').format(
        at.astimezone(UTC).isoformat(timespec="milliseconds"), f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    )


def _segment(text: str) -> str:
    """As one segment of the path of an address."""
    return quote(text, safe="")


_ENVIRONMENT: Final = Environment(
    loader=PackageLoader("bridge.console"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "age": age,
    "count": _count,
    "size": _size,
    "bytes": _bytes,
    "rate": _rate,
    "duration": _duration,
    "ago": _ago,
    "when": _when,
    "problem_words": problem_words,
    "segment": _segment,
}
_ENVIRONMENT.globals["version"] = __version__
_ENVIRONMENT.globals["counted"] = COUNTED


def render(template: str, context: Mapping[str, Any]) -> str:
    """The text of a page, or of a part of one."""
    return _ENVIRONMENT.get_template(template).render(context)
