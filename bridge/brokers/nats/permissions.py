"""What a user may do, as the server says it to the user itself (``$SYS.REQ.USER.INFO``, NATS 2.10 and newer)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Connection
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import filters, overlap
from bridge.errors import PrivilegeError, RefusedError

QUESTION: Final = "$SYS.REQ.USER.INFO"

Extent = Literal["all", "some", "none"]


@dataclass(frozen=True, slots=True)
class Permissions:
    """What a user may publish to. Subjects are lists of words."""

    allowed: Sequence[Sequence[str]] | None
    """None: everything."""
    denied: Sequence[Sequence[str]]
    replies: bool
    """Whether it may also answer whatever it receives, as an acknowledgement does."""

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """From the server's answer, which leaves out what is not limited."""
        publish = given.get("publish") or {}
        allowed = publish.get("allow")
        return cls(
            None if not allowed else [subject.split(".") for subject in allowed],
            [subject.split(".") for subject in publish.get("deny") or []],
            given.get("responses") is not None,
        )

    def publish(self, subject: str) -> Extent:
        """How much of a subject, which may have wildcards, it may publish to."""
        words = subject.split(".")
        if any(_covers(each, words) for each in self.denied):
            return "none"
        if self.allowed is not None and not any(overlap(each, words) for each in self.allowed):
            return "none"
        whole = self.allowed is None or any(_covers(each, words) for each in self.allowed)
        return "all" if whole and not any(overlap(each, words) for each in self.denied) else "some"


def _covers(subject: Sequence[str], other: Sequence[str]) -> bool:
    """Whether it takes all that the other one takes."""
    for at, word in enumerate(subject):
        if word == ">":
            return len(other) > at
        if at >= len(other) or other[at] == ">" or word not in ("*", other[at]):
            return False
    return len(subject) == len(other)


async def permissions_of(connection: Connection) -> Permissions | None:
    """None where the server does not say. Raises BrokerUnavailableError."""
    try:
        async with connection.asking():
            answer = await connection.client.request(QUESTION, timeout=REQUEST_TIMEOUT)
    except RefusedError:  # not permitted, or an older server, on which nobody answers
        return None
    data = json.loads(answer.data).get("data") or {}
    return Permissions.of(data.get("permissions") or {})


async def inspected(
    connection: Connection,
    settings: NatsSettings,
    *,
    subjects: Sequence[str],
    topics: Sequence[str],
    below: str,
    answers: str | None = None,
    better: Mapping[str, str] | None = None,
) -> list[str]:
    """Whether the user may publish to each of these subjects; to what topics of these patterns become below the stream
    `below`; and its acknowledgements to `answers`. `better`: subjects that nobody needs, and what is worse without.

    Returns what was found, in words. Raises PrivilegeError, BrokerUnavailableError.
    """
    found = await permissions_of(connection)
    if found is None:
        return [f"what else this user may do cannot be known: let it publish to {QUESTION}, and NATS says it"]
    denied = [subject for subject in subjects if found.publish(subject) != "all"]
    if answers is not None and not found.replies and found.publish(answers) != "all":
        denied.append(answers)
    partly = []
    for topic in topics:
        wanted = filters(below, [topic])
        extents = {found.publish(subject) for subject in wanted}
        if extents == {"none"}:
            denied += wanted
        elif extents != {"all"}:
            partly += wanted
    if denied:
        raise PrivilegeError(
            f"{settings.key('url')}: NATS at {connection.address} does not permit the user to publish to "
            f"{', '.join(denied)}. Grant it in the permissions of the user or account"
        )
    said = [
        f"may not publish to {subject}, so {worse}"
        for subject, worse in (better or {}).items()
        if found.publish(subject) != "all"
    ]
    if partly:
        said.append(f"may publish to a part of {', '.join(partly)} only: whether to all of yours, cannot be known")
    return said
