"""Groups of dead letters: what failed at one place, with one code and for one reason, under an id that stays."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from bridge.brokers.contract import Letter
from bridge.commands.dead_outbox import OUTBOX

_UUID: Final = re.compile(r"\b[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}\b", re.IGNORECASE)
_NUMBER: Final = re.compile(r"\b0x[0-9a-f]+\b|\d+(?:[.,:]\d+)*", re.IGNORECASE)
_ID_LENGTH: Final = 8


@dataclass(frozen=True, slots=True)
class Group:
    """What several letters have in common, and how many they are."""

    id: str
    """The same for every letter of this place, code and reason, at any time and on any machine."""
    place: str
    code: str
    reason: str
    """With `<id>` for each UUID and `#` for each number."""
    letters: int
    first: datetime | None
    last: datetime | None


def place_of(letter: Letter) -> str:
    """Where it failed: a worker, or a sink; a dash where no route took it."""
    return letter.box if letter.box != OUTBOX else letter.sink or "-"


def plain_reason(reason: str) -> str:
    """A reason without what differs from letter to letter."""
    return _NUMBER.sub("#", _UUID.sub("<id>", " ".join(reason.split())))


def group_id(letter: Letter) -> str:
    """The id of the group that the letter belongs to."""
    of = (letter.box, "" if letter.box != OUTBOX else letter.sink or "", letter.code, plain_reason(letter.reason))
    return hashlib.sha256("\0".join(of).encode()).hexdigest()[:_ID_LENGTH]


def grouped(letters: Iterable[Letter]) -> list[Group]:
    """The groups of letters, the largest first."""
    return groups_of((group_id(letter), letter) for letter in letters)


def groups_of(letters: Iterable[tuple[str, Letter]]) -> list[Group]:
    """As `grouped`, of letters that come with the ids of their groups."""
    together: dict[str, list[Letter]] = {}
    for id_, letter in letters:
        together.setdefault(id_, []).append(letter)
    groups = []
    for id_, members in together.items():
        times = [letter.failed_at for letter in members if letter.failed_at is not None]
        one = members[0]
        groups.append(
            Group(
                id_, place_of(one), one.code, plain_reason(one.reason), len(members),
                min(times, default=None), max(times, default=None),
            )
        )  # fmt: skip
    return sorted(groups, key=lambda group: -group.letters)
