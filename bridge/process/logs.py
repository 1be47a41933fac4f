"""Logs: lines for a person on a terminal, JSON otherwise; every line has a stable `action`.

Ours go through structlog. What libraries, asyncio and `warnings` say through the standard module becomes the same kind
of line, with the action ``library.message``. In the journal each line begins with its syslog priority, so that
``journalctl -p warning`` shows the warnings.
"""

import logging
import os
import sys
from collections.abc import MutableMapping, Sequence
from functools import partial
from io import StringIO
from typing import Any, Final, TextIO

import structlog
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import ExceptionRenderer, JSONRenderer, TimeStamper, add_log_level
from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import ExcInfo, Processor

from bridge.process.visible import json_text, one_line, visible
from bridge.settings import ObserveSettings

_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog, for each level; see sd-daemon(3)."""

_TO_SERVERS: Final = {
    "psycopg": logging.ERROR,
    "aio_pika": logging.ERROR,
    "aiormq": logging.ERROR,
    # It raises what it says at this level, so it would be a line for each attempt to connect.
    "aiormq.connection": logging.CRITICAL,
    "nats": logging.ERROR,
    "grpc": logging.ERROR,
    "google": logging.ERROR,
    # It warns of variables that it cannot follow; what it says of the collector is kept back, see `spans`.
    "opentelemetry": logging.WARNING,
}
"""Libraries that speak to a server, and the lowest level that is logged of each. An outage is logged by `Outage`, once;
of these lines only what went wrong beside that counts, and never with a stack trace."""


_FIRST: Final[tuple[Processor, ...]] = (
    structlog.contextvars.merge_contextvars,
    add_log_level,
    TimeStamper(fmt="iso", utc=True),
)


def keep_off_output() -> None:
    """For a command that sets no logs up: what is logged goes to standard error, since others read what it prints."""
    if not structlog.is_configured():
        last = [_action, *_text()]
        structlog.configure(processors=[*_FIRST, *last], logger_factory=lambda *_: structlog.WriteLogger(sys.stderr))
        if logging.lastResort is not None:  # what the standard module logs by where nobody has set it up
            logging.lastResort.setFormatter(_formatter(last))


def configure(settings: ObserveSettings) -> None:
    """Sets the logs of this process up, on standard error, since standard output belongs to commands."""
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    level: int = getattr(logging, settings.log_level.upper())
    last = [_action, *(_text() if text else _json())]
    structlog.configure(
        processors=[*_FIRST, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(last))
    # What libraries say below a warning is for their authors.
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    for name, lowest in _TO_SERVERS.items():
        logging.getLogger(name).setLevel(max(level, lowest))
    logging.captureWarnings(True)


def _formatter(last: Sequence[Processor]) -> ProcessorFormatter:
    """What makes lines like ours of those of libraries."""
    return ProcessorFormatter(foreign_pre_chain=[*_FIRST, _library], processors=last)


def journal_prefix(level: str) -> str:
    """What a line of this level begins with when the journal reads standard error, as ``<4>``; nothing otherwise."""
    return _priority(level) if _journal_reads() else ""


def _priority(level: str) -> str:
    return f"<{_PRIORITIES.get(level, _PRIORITIES['info'])}>"


def _journal_reads() -> bool:
    """Whether standard error is the stream that systemd names in JOURNAL_STREAM; see systemd.exec(5)."""
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


# No values of variables in traces: they hold payloads and passwords.


def _json() -> list[Processor]:
    traces = ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    return [traces, _prioritized(JSONRenderer(serializer=json_text))]


def _text() -> list[Processor]:
    colors = sys.stderr.isatty()
    lines = ConsoleRenderer(event_key="action", colors=colors, exception_formatter=_plain_traceback)
    return [_harmless, _prioritized(lines)]


def _harmless(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What others wrote, as it may be on a terminal; other values than texts are shown as Python writes them."""
    for name, value in line.items():
        if isinstance(value, str):
            line[name] = one_line(value)
    return line


def _plain_traceback(lines: TextIO, error: ExcInfo) -> None:
    text = StringIO()
    plain_traceback(text, error)
    lines.write(visible(text.getvalue()))


def _prioritized(renderer: Processor) -> Processor:
    """The renderer, with a priority before each line if the journal reads them."""
    return partial(_render_for_journal, renderer) if _journal_reads() else renderer


def _render_for_journal(renderer: Processor, logger: Any, method: str, line: MutableMapping[str, Any]) -> str:
    prefix = _priority(line["level"])
    return "\n".join(prefix + each for each in str(renderer(logger, method, line)).split("\n"))


def _action(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog names the first argument `event`, a word that means something else here."""
    line["action"] = line.pop("event")
    return line


def _library(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A record of the standard module, as a line of ours."""
    record: logging.LogRecord = line.pop("_record")
    del line["_from_structlog"]
    line["logger"], line["message"], line["event"] = record.name, line["event"], "library.message"
    if record.exc_info and record.exc_info[1] is not None and record.name.split(".")[0] in _TO_SERVERS:
        error = record.exc_info[1]
        line["reason"] = f"{type(error).__name__}: {error}"
        del line["exc_info"]
    return line
