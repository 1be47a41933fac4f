"""Whether a process records spans, and until when. Where the settings do not ask for them, nothing of OpenTelemetry is
imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bridge.errors import SettingsError
from bridge.settings import Settings

if TYPE_CHECKING:
    from bridge.process.spans import Spans


@contextmanager
def recording(settings: Settings, service: str) -> Iterator["Spans | None"]:
    """Records spans while the body runs, under the name `service` where OTEL_SERVICE_NAME gives no other, and sends the
    last ones at its end, within `spans.FLUSH_LIMIT` seconds; None where `observe.traces` is false.

    Raises SettingsError where OpenTelemetry is not installed, and what `spans.Spans` raises.
    """
    if not settings.observe.traces:
        yield None
        return
    spans = make_spans(settings, service)
    try:
        yield spans
    finally:
        spans.close()


def make_spans(settings: Settings, service: str) -> "Spans":
    """What records them; to be closed. Raises as `recording`."""
    with _installed():
        from bridge.process.spans import Spans
    return Spans(settings.name, service)


def refusal() -> str | None:
    """Why the collector that the environment names takes no spans; None where it does. Raises as `recording`."""
    with _installed():
        from bridge.process.spans import ask_collector
    return ask_collector()


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise SettingsError(
            f"observe.traces: needs the package {error.name}: pip install 'pgbridge[otel]'; or set it to false"
        ) from error
