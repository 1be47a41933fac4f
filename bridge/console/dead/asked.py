"""Which dead letters an address asks for, as the pages and forms of dead letters hand it on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Self
from urllib.parse import parse_qsl, urlencode

from bridge.commands.dead_letters import Choice, selected_ids
from bridge.console.dead.boxes import Sorted
from bridge.console.moments import moment_of
from bridge.errors import UsageError

FIELDS: Final = ("group", "worker", "sink", "code", "topic", "since", "until", "id")
"""As they stand in an address; each may come several times, but for the times."""

_LONGEST: Final = 60_000
"""Characters of all of them."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The fields that hold something, in their order."""

    given: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> Self:
        """Leaves out what is no such field, or empty. Raises UsageError where there is too much of them."""
        given = [(name, value.strip()) for name, value in pairs if name in FIELDS and value.strip()]
        if sum(len(value) for _, value in given) > _LONGEST:
            raise UsageError(f"the filters have more than {_LONGEST:,} characters")
        return cls(given)

    @classmethod
    def of_query(cls, query: str) -> Self:
        """What `query` gave. Raises UsageError."""
        try:
            return cls.of(parse_qsl(query, max_num_fields=1000))
        except ValueError:
            raise UsageError("the filters cannot be read; there are too many") from None

    def get(self, name: str) -> str:
        """The first value of a field; empty without one."""
        return next((value for each, value in self.given if each == name), "")

    def all(self, name: str) -> tuple[str, ...]:
        """Every value of a field."""
        return tuple(value for each, value in self.given if each == name)

    def query(self, **other: str | None) -> str:
        """As it stands in an address, but for these fields."""
        kept = [(name, value) for name, value in self.given if name not in other]
        return urlencode([*kept, *((name, value) for name, value in other.items() if value)])

    def address(self, path: str = "/dead", **other: str | None) -> str:
        """Of a page that shows the same, but for these fields."""
        query = self.query(**other)
        return f"{path}?{query}" if query else path

    def choice(self) -> Choice:
        """Raises UsageError, which says which field is wrong."""
        return Choice(
            ids=selected_ids(self.all("id")),
            topics=tuple(" ".join(self.all("topic")).replace(",", " ").split()),
            codes=self.all("code"),
            sinks=self.all("sink"),
            workers=self.all("worker"),
            since=moment_of("since", self.get("since") or None),
            groups=self.all("group"),
            until=moment_of("until", self.get("until") or None),
        )

    def chosen(self, letters: Iterable[Sorted]) -> list[Sorted]:
        """Those that are meant, those that failed last first. Raises UsageError."""
        choice = self.choice()
        # Whose groups are known.
        others = replace(choice, groups=())
        return sorted(
            (
                each
                for each in letters
                if (not choice.groups or each.group in choice.groups) and others.takes(each.letter)
            ),
            key=place,
            reverse=True,
        )


def place(each: Sorted) -> tuple[datetime, str]:
    """Its place in a list."""
    return each.letter.failed_at or datetime.min.replace(tzinfo=UTC), each.letter.id
