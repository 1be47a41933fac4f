"""What a page is, and what it is given to work with."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from starlette.requests import Request

from bridge.console.access import Person
from bridge.console.database import Database
from bridge.console.dead.boxes import DeadBoxes
from bridge.console.reader import SELDOM, Reader
from bridge.console.recent import Recent
from bridge.console.work import Work
from bridge.errors import UnavailableError, UsageError
from bridge.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """What the pages share."""

    settings: Settings
    database: Database
    """For what only one page asks. What all pages show comes from the reader."""
    reader: Reader
    dead: DeadBoxes
    """Which dead letters there are."""
    work: Work = field(default_factory=Work)
    """What a person has begun, and goes on."""
    recent: Recent = field(default_factory=Recent)
    """What pages ask for themselves, once for all browsers."""

    @property
    def seldom(self) -> float:
        """Seconds for which an answer is kept that has to be found among many rows."""
        return SELDOM * self.settings.console.interval

    def outdate(self) -> None:
        """Somebody has acted: what pages show from now on is of after that."""
        self.reader.outdate()
        self.recent.forget()

    async def require_acting(self) -> None:
        """Raises UsageError where the console's login in the database may look only. It might publish all the same,
        and could not write down that it did. Raises UnavailableError while nobody knows."""
        seen = await self.reader.look()
        if seen.may_act is None:
            raise UnavailableError(f"the database has not answered yet: {seen.outage}")
        if not seen.may_act:
            raise UsageError(
                "the console's login in the database may only look. For acting, give it the role bridge_operator"
            )


Show: TypeAlias = Callable[[Parts, Request], Awaitable[dict[str, Any]]]
"""Gives what the page's templates show. It is called for the page, and for each renewal of its live part."""

Form: TypeAlias = Mapping[str, str]

LONGEST_REASON: Final = 500
"""Characters."""


def reason_of(form: Form, missing: str) -> str:
    """The reason that a person gives in the field ``why``. Raises UsageError: with `missing` where there is none."""
    why = form.get("why", "").strip()
    if not why:
        raise UsageError(missing)
    if len(why) > LONGEST_REASON:
        raise UsageError(f"the reason has {len(why)} letters; {LONGEST_REASON} are enough")
    return why


Act: TypeAlias = Callable[[Parts, Person, Form], Awaitable[str]]
"""Does what a person may and asks for. Gives the sentence that says so, and raises PgbridgeError with one that says why
not."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page. Its templates are ``<name>.html``, which extends ``base.html``, and ``_<name>.html``, the part of it
    that is live."""

    name: str
    path: str
    """With parameters as Starlette has them: ``/events/{id}``."""
    title: str
    """In the menu, and of the window."""
    show: Show
    in_menu: bool = True
    actions: Mapping[str, Act] = field(default_factory=dict)
    """By name; a form posts to ``<path>/<name>``."""
