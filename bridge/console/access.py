"""Who is there, and what they may.

On loopback everybody who reaches the console is its user, and may act; elsewhere people log in with a token, or a
trusted proxy says who they are. One cookie names the browser. It is worth nothing by itself: a login binds a person to
it, and the tokens that forms carry are made from it.
"""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import Final

from starlette.requests import HTTPConnection

from bridge.errors import SettingsError
from bridge.process.addresses import is_here
from bridge.process.person import current_person
from bridge.settings import Settings
from bridge.settings.models import ConsoleProxySettings

_SESSIONS: Final = 1000
"""Logins that last; the oldest ends where there are more."""
_TRIES: Final = 5
"""Wrong tokens from one address in `_TRIES_IN` seconds, after which none is looked at."""
_TRIES_IN: Final = 60.0
_ADDRESSES: Final = 10_000
"""Addresses that are remembered for that."""
_LONGEST_NAME: Final = 100


class Role(StrEnum):
    """What somebody may."""

    VIEWER = "viewer"
    """Look."""
    OPERATOR = "operator"
    """Look, and act."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who is there."""

    name: str
    role: Role
    logged_in: bool = False
    """With a token, so that there is something to log out of."""

    @property
    def signature(self) -> str:
        """For what is written down about an action."""
        return f"{self.name} (console)"


@dataclass(frozen=True, slots=True)
class _Session:
    person: Person
    ends: float


class Access:
    """Decides. Raises SettingsError where the settings would leave the console open to a network."""

    def __init__(self, settings: Settings) -> None:
        self._console = settings.console
        self._is_local = is_here(settings.console.listen.rpartition(":")[0])
        self._tokens = {
            role: token.get_secret_value().encode()
            for role, token in ((Role.OPERATOR, settings.console.token), (Role.VIEWER, settings.console.viewer_token))
            if token is not None
        }
        self._networks = [ip_network(each) for each in (self._console.proxy.addresses if self._console.proxy else [])]
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()
        self._key = secrets.token_bytes(32)
        self._here = current_person()
        self.is_secure = (self._console.url or "").startswith("https://")
        """Whether browsers come over TLS."""
        self.cookie = f"{'__Host-' if self.is_secure else ''}pgbridge-{settings.name}"
        """Its name. Ports do not tell cookies apart, so two consoles on one host need two."""
        if not (self._is_local or self._tokens or self._console.proxy):
            raise SettingsError(
                f"console.listen: {self._console.listen} is open to a network, and nobody would have to log in. Give "
                "console.token (or console.viewer_token), or name the proxy that knows who is there in console.proxy, "
                "or listen on this machine only: 127.0.0.1:8417"
            )

    @property
    def takes_tokens(self) -> bool:
        """Whether there is anything to log in with."""
        return bool(self._tokens)

    @property
    def is_plain(self) -> bool:
        """Whether tokens and pages cross a network that may read them."""
        return not (self._is_local or self.is_secure)

    @property
    def is_read_only(self) -> bool:
        """Whether the settings let nobody act."""
        return self._console.read_only

    def knows_host(self, host: str) -> bool:
        """Whether a request for this host is meant for us. Somebody else's page can make a browser on this machine send
        requests here under a name of its own, and could read the answers as its own. A login's cookie does not go
        with those, so beyond loopback only a `url` makes a difference."""
        host = host.lower()
        if self._console.url is not None and host == self._console.url.partition("://")[2]:
            return True
        if self._is_local:
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            return bool(name) and is_here(name)
        return self._console.url is None or host == self._console.listen.lower()

    def is_own_origin(self, request: HTTPConnection) -> bool:
        """Whether a form was sent by a page of ours, as far as the browser tells."""
        site = request.headers.get("sec-fetch-site", "same-origin")
        origin = request.headers.get("origin")
        host = request.headers.get("host", "").lower()
        return site in ("same-origin", "none") and (origin is None or origin.partition("://")[2].lower() == host)

    # Who is there

    def person(self, request: HTTPConnection) -> Person | None:
        """None for whoever must log in first."""
        proxy = self._console.proxy
        if proxy is not None and self._is_proxy(address_of(request)):
            return _forwarded(request, proxy)
        session = self._sessions.get(self.browser(request) or "")
        if session is not None:
            return session.person if session.ends > time.monotonic() else None
        if self._is_local and not self._tokens and self._console.proxy is None:
            return Person(self._here, Role.OPERATOR)
        return None

    def _is_proxy(self, address: str) -> bool:
        try:
            return any(ip_address(address) in network for network in self._networks)
        except ValueError:
            return False

    def browser(self, request: HTTPConnection) -> str | None:
        """What the cookie holds."""
        return request.cookies.get(self.cookie) or None

    @staticmethod
    def new_browser() -> str:
        """For a cookie."""
        return secrets.token_urlsafe(24)

    # Forms

    def form_token(self, browser: str, person: Person | None) -> str:
        """What a form must bring that this person sends from this browser."""
        message = f"{browser}\n{'' if person is None else person.name}"
        return hmac.new(self._key, message.encode(), hashlib.sha256).hexdigest()

    def is_form_of(self, token: str, browser: str | None, person: Person | None) -> bool:
        """Whether it brings that."""
        return browser is not None and hmac.compare_digest(token.encode(), self.form_token(browser, person).encode())

    # Logging in and out

    def wait_before_login(self, address: str) -> float:
        """Seconds for which tokens from this address are not looked at."""
        now = time.monotonic()
        tries = [at for at in self._wrong.get(address, ()) if at > now - _TRIES_IN]
        return tries[0] + _TRIES_IN - now if len(tries) >= _TRIES else 0.0

    def log_in(self, address: str, name: str, token: str) -> str | None:
        """The value of the cookie of who gave a right token; None for a wrong one. Raises ValueError for a name that
        cannot be written down."""
        name = name.strip()
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise ValueError(f"Give your name, in up to {_LONGEST_NAME} letters: it is written down with what you do.")
        role = None
        for each, right in self._tokens.items():
            if hmac.compare_digest(token.encode(), right):
                role = each
        if role is None:
            self._remember_wrong(address)
            return None
        self._wrong.pop(address, None)
        browser = self.new_browser()
        self._sessions[browser] = _Session(Person(name, role, True), time.monotonic() + self._console.session)
        while len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)
        return browser

    def _remember_wrong(self, address: str) -> None:
        self._wrong[address] = [*self._wrong.pop(address, ())[-_TRIES + 1 :], time.monotonic()]
        while len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)

    def log_out(self, request: HTTPConnection) -> None:
        """Forgets the login of this browser."""
        self._sessions.pop(self.browser(request) or "", None)


def address_of(request: HTTPConnection) -> str:
    """Where it comes from; the proxy's, behind one."""
    return request.client.host if request.client else ""


def _forwarded(request: HTTPConnection, proxy: ConsoleProxySettings) -> Person | None:
    """Whom the proxy names."""
    user = _only(request, proxy.user_header)
    if not user or len(user) > _LONGEST_NAME or not user.isprintable():
        return None
    groups = _only(request, proxy.groups_header) if proxy.groups_header else None
    belongs = {user, *(group.strip() for group in (groups or "").split(","))}
    return Person(user, Role.OPERATOR if belongs & set(proxy.operators) else Role.VIEWER)


def _only(request: HTTPConnection, header: str) -> str | None:
    """A header that came once; one that came twice may be a browser's beside the proxy's."""
    values = request.headers.getlist(header)
    return values[0].strip() if len(values) == 1 else None


HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer, browsers say of a form's origin that it is "null".
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""Of every answer."""
