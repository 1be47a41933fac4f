"""The streams that hold events and dead letters."""

from collections.abc import Sequence

from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from bridge.errors import TopologyError
from bridge.observe.topology import Declaration

DUPLICATE_WINDOW = 120.0
"""Seconds within which a message that is published again is stored once."""


async def stream(jetstream: JetStreamContext, name: str, *, apply: bool) -> Declaration:
    """The state of a stream that takes ``<name>.>``; with `apply`, a missing one is declared.

    Declared on disk and without limits, since a limit would drop events that no worker has seen: the operator sets
    `max_age` or `max_bytes` to what the disk holds. A full stream refuses what is new, so the bridge waits. Limits and
    replicas are never compared: they are the operator's.
    """
    subject = f"{name}.>"
    try:
        found = (await jetstream.stream_info(name)).config
    except NotFoundError:
        if not apply:
            return Declaration("stream", name, "missing", f"subjects {subject}, file storage")
    else:
        problem = _problem_with(found, subject)
        return Declaration("stream", name, "differs" if problem else "present", problem or f"subjects {subject}")
    await jetstream.add_stream(
        StreamConfig(
            name=name,
            description="pgbridge",
            subjects=[subject],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            duplicate_window=DUPLICATE_WINDOW,
        )
    )
    return Declaration("stream", name, "declared", f"subjects {subject}, file storage")


def _problem_with(found: StreamConfig, subject: str) -> str | None:
    mend = "mend it with `nats stream edit`, or name another stream in the settings"
    if subject not in (found.subjects or []):
        return f"it takes {', '.join(found.subjects or []) or 'no subjects'}, and not {subject}; {mend}"
    if found.storage != StorageType.FILE:
        return "it is kept in memory, so a restart of the server loses it; delete it and declare it again"
    if found.duplicate_window < DUPLICATE_WINDOW:
        return (
            f"its duplicate window is {found.duplicate_window:g} s, and events that are sent again need "
            f"{DUPLICATE_WINDOW:g} s; {mend}"
        )
    return None


def require(found: Sequence[Declaration], address: str) -> None:
    """Raises TopologyError when anything is missing or differs."""
    lacking = [each for each in found if each.state in ("missing", "differs")]
    if lacking:
        raise TopologyError(
            f"NATS at {address} is not ready: "
            + "; ".join(f"{each.kind} {each.name} {each.state}: {each.detail}" for each in lacking)
            + ". Run `pgbridge topology --apply`"
        )
