"""Logs: lines for a person on a terminal, JSON otherwise; every line has a stable `action`."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from bridge.settings import ObserveSettings


def configure(settings: ObserveSettings) -> None:
    """Sets structlog up for this process, on standard error, since standard output belongs to commands."""
    terminal = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    level = getattr(logging, settings.log_level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor]
    if terminal:
        renderer = [structlog.dev.ConsoleRenderer(event_key="action", colors=sys.stderr.isatty())]
    else:
        renderer = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(ensure_ascii=False)]
    structlog.configure(
        processors=[*shared, _action, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard module; only what an operator must act on is let through.
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(name)s: %(message)s")
    # psycopg sets a level of its own, and its pool warns of every connection that a restart ended.
    logging.getLogger("psycopg").setLevel(logging.ERROR)


def _action(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog names the first argument `event`, a word that means something else here."""
    line["action"] = line.pop("event")
    return line
