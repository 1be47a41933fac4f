"""The application: who is let in, and which function answers.

A request goes through `_Gate`, which knows the hosts that are ours and gives every answer its headers, to one of four
kinds of function: a page, its live stream, an action of it, or the login. All pages share these, so that none can
forget whom it lets in.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, quote

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridge.console.access import HEADERS, Access, Person, Role, address_of
from bridge.console.live import EventStream
from bridge.console.pages import PAGES
from bridge.console.parts import Act, Page, Parts
from bridge.console.rendering import render
from bridge.errors import PgbridgeError, UsageError

log = structlog.get_logger()

_LARGEST_FORM: Final = 64_000
"""Bytes."""
_READING: Final = 10.0
"""Seconds that a form may take to come."""
_MOST_STREAMS: Final = 100
"""Live pages at once; further ones are told to come back."""
_MOST_NOTICES: Final = 1000


class _Refused(HTTPException):
    """An answer that is an error, in words for a person."""

    def __init__(self, status: int, words: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, words, headers)


def make_app(parts: Parts, access: Access, stop: asyncio.Event) -> ASGIApp:
    """The ASGI application. Streams end when `stop` is set."""
    site = _Site(parts, access, stop)
    routes: list[BaseRoute] = [
        Mount("/static", _Static(packages=[("bridge.console", "static")])),
        Route("/login", site.login_page, methods=["GET"]),
        Route("/login", site.log_in, methods=["POST"]),
        Route("/logout", site.log_out, methods=["POST"]),
    ]
    for page in PAGES:
        routes.append(Route(page.path, site.page(page), methods=["GET"], name=page.name))
        routes.append(Route(f"/live{page.path}", site.live(page), methods=["GET"]))
        routes += [
            Route(f"{page.path.rstrip('/')}/{name}", site.action(page, name, act), methods=["POST"])
            for name, act in page.actions.items()
        ]
    handlers = {HTTPException: site.refused, PgbridgeError: site.failed, Exception: site.crashed}
    return _Gate(Starlette(routes=routes, exception_handlers=handlers), access)


class _Gate:
    """What holds for every request, and for every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.lower().encode(), value.encode())
                        for name, value in HEADERS.items()
                        if name.lower().encode() not in given
                    ),
                ]
            await send(message)

        host = HTTPConnection(scope).headers.get("host", "")
        if not self._access.knows_host(host):
            log.warning("console.unknown_host", host=host[:200])
            words = (
                "The console does not answer under this name. Use the address that it listens at, or set console.url "
                "to the one that browsers use.\n"
            )
            await Response(words, 421, media_type="text/plain")(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


class _Static(StaticFiles):
    """Files of ours; browsers keep them, and ask whether they are new."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers["Cache-Control"] = "no-cache"
        return response


class _Site:
    """The functions that answer."""

    def __init__(self, parts: Parts, access: Access, stop: asyncio.Event) -> None:
        self._parts = parts
        self._access = access
        self._stop = stop
        self._streams = 0
        self._notices: OrderedDict[str, tuple[bool, str]] = OrderedDict()
        """By browser, what its next page says of its last action, and whether that was done."""

    # Pages

    def page(self, page: Page) -> Any:
        """Answers with the page."""

        async def show(request: Request) -> Response:
            person = self._access.person(request)
            if person is None:
                return self._to_login(request)
            browser = self._access.browser(request) or self._access.new_browser()
            context = await self._context(page, request, person, browser)
            context["notice"] = self._notices.pop(browser, None)
            query = f"?{request.url.query}" if request.url.query else ""
            context["live"] = f"/live{quote(request.scope['path'])}{query}"
            response = HTMLResponse(render(f"{page.name}.html", context))
            self._give_cookie(response, browser)
            return response

        return show

    def live(self, page: Page) -> Any:
        """Answers with a stream of the page's live part."""

        async def stream(request: Request) -> Response | EventStream:
            if self._access.person(request) is None:
                raise _Refused(401, "Log in again.")
            if request.method == "HEAD":
                return Response()
            if self._streams >= _MOST_STREAMS or self._stop.is_set():
                raise _Refused(503, f"{_MOST_STREAMS} live pages are open already.", {"Retry-After": "30"})
            return EventStream(self._renewals(page, request))

        return stream

    async def _renewals(self, page: Page, request: Request) -> AsyncIterator[str]:
        self._streams += 1
        try:
            # A login ends; so does the stream, and the browser asks for a new one, and is sent to log in.
            while not self._stop.is_set() and (person := self._access.person(request)) is not None:
                browser = self._access.browser(request) or ""
                try:
                    yield render(f"_{page.name}.html", await self._context(page, request, person, browser))
                except PgbridgeError as error:
                    yield render("_failed.html", {"words": str(error)})
                try:
                    async with asyncio.timeout(self._parts.settings.console.interval):
                        await self._stop.wait()
                except TimeoutError:
                    continue
        finally:
            self._streams -= 1

    async def _context(self, page: Page, request: Request, person: Person, browser: str) -> dict[str, Any]:
        """What the templates of a page are given, beside what all are."""
        base = self._base(person, browser)
        return {**base, "page": page, **await page.show(self._parts, request)}

    def _base(self, person: Person | None, browser: str) -> dict[str, Any]:
        return {
            "pages": PAGES,
            "name": self._parts.settings.name,
            "person": person,
            "form_token": self._access.form_token(browser, person),
            "why_not": None if person is None else self._why_not(person),
        }

    # Actions

    def _why_not(self, person: Person) -> str | None:
        """Why this person may not act; None where they may, as far as the console can tell."""
        if self._access.is_read_only:
            return "This console is for looking only: console.read_only is set."
        if person.role is not Role.OPERATOR:
            return "You may look, and not act."
        return None

    def action(self, page: Page, name: str, act: Act) -> Any:
        """Answers a form that asks for an action, and leads back to the page."""

        async def answer(request: Request) -> Response:
            form = await _form_of(request)
            person = self._access.person(request)
            if person is None:
                return self._to_login(request)
            self._require_own_form(request, form, person)
            why_not = self._why_not(person)
            if why_not is not None:
                raise _Refused(403, why_not)
            where = f"{page.name}.{name}"
            told = {key: value[:200] for key, value in form.items() if key not in ("form_token", "back")}
            try:
                done, words = True, await act(self._parts, person, form)
                log.info("console.acted", person=person.name, what=where, **{"form": told})
            except PgbridgeError as error:
                done, words = False, f"Not done: {error}"
                log.warning("console.not_done", person=person.name, what=where, form=told, reason=str(error))
            self._parts.outdate()
            self._notices[self._access.browser(request) or ""] = (done, words)
            while len(self._notices) > _MOST_NOTICES:
                self._notices.popitem(last=False)
            return RedirectResponse(_local(form.get("back", ""), page.path), 303)

        return answer

    def _require_own_form(self, request: Request, form: dict[str, str], person: Person | None) -> None:
        token = form.get("form_token", "")
        is_ours = self._access.is_own_origin(request)
        if not is_ours or not self._access.is_form_of(token, self._access.browser(request), person):
            log.warning("console.foreign_form", address=address_of(request))
            raise _Refused(
                403, "This form is not one that the console has shown you lately. Go back, reload, try again."
            )

    # Logging in and out

    def _to_login(self, request: Request) -> Response:
        if not self._access.takes_tokens:
            raise _Refused(
                403,
                "Nobody said who you are. Come through the proxy that console.proxy names, which must send its header.",
            )
        query = f"?{request.url.query}" if request.url.query else ""
        back = quote(f"{request.url.path}{query}") if request.method == "GET" else "/"
        return RedirectResponse(f"/login?back={back}", 303)

    async def login_page(self, request: Request) -> Response:
        """The form."""
        if self._access.person(request) is not None:
            return RedirectResponse(_local(request.query_params.get("back", ""), "/"), 303)
        return self._login_form(request, request.query_params.get("back", "/"))

    def _login_form(self, request: Request, back: str, name: str = "", wrong: str = "", status: int = 200) -> Response:
        browser = self._access.browser(request) or self._access.new_browser()
        context = {
            **self._base(None, browser),
            "back": _local(back, "/"),
            "given": name,
            "wrong": wrong,
            "takes_tokens": self._access.takes_tokens,
        }
        response = HTMLResponse(render("login.html", context), status)
        self._give_cookie(response, browser)
        return response

    async def log_in(self, request: Request) -> Response:
        """What the form sends."""
        form = await _form_of(request)
        self._require_own_form(request, form, None)
        back, name, address = form.get("back", ""), form.get("name", ""), address_of(request)
        wait = self._access.wait_before_login(address)
        if wait:
            log.warning("console.login_refused", address=address, reason="too many wrong tokens")
            words = f"Too many wrong tokens from {address}. Try again in {wait:.0f} s."
            response = self._login_form(request, back, name, words, 429)
            response.headers["Retry-After"] = f"{wait + 1:.0f}"
            return response
        try:
            browser = self._access.log_in(address, name, form.get("token", ""))
        except ValueError as error:
            return self._login_form(request, back, "", str(error), 422)
        if browser is None:
            log.warning("console.login_refused", address=address, reason="wrong token")
            words = "This token is not right. It is the value of console.token, or of console.viewer_token."
            return self._login_form(request, back, name, words, 403)
        log.info("console.logged_in", address=address, person=name.strip())
        back_to = RedirectResponse(_local(back, "/"), 303)
        self._give_cookie(back_to, browser)
        return back_to

    async def log_out(self, request: Request) -> Response:
        """Forgets the login."""
        form = await _form_of(request)
        self._require_own_form(request, form, self._access.person(request))
        self._access.log_out(request)
        gone = RedirectResponse("/login", 303)
        self._give_cookie(gone, self._access.new_browser())
        return gone

    def _give_cookie(self, response: Response, browser: str) -> None:
        response.set_cookie(
            self._access.cookie, browser, path="/", httponly=True, samesite="strict", secure=self._access.is_secure
        )

    # Errors

    async def refused(self, request: Request, error: Exception) -> Response:
        """What is no page, or not for this person."""
        if not isinstance(error, HTTPException):  # as Starlette's types have it
            raise error
        words = error.detail
        if error.status_code == 404:
            words = "There is no such page. The menu leads to those that there are."
        return self._error_page(request, error.status_code, words, dict(error.headers or {}))

    async def failed(self, request: Request, error: Exception) -> Response:
        """A page that was asked for what it cannot show, or could not ask what it had to."""
        return self._error_page(request, 422 if isinstance(error, UsageError) else 503, str(error))

    async def crashed(self, request: Request, error: Exception) -> Response:
        """A defect."""
        log.error("console.crashed", path=request.url.path, exc_info=error)
        return self._error_page(request, 500, "A defect of pgbridge. The log of the console has more.")

    def _error_page(self, request: Request, status: int, words: str, headers: dict[str, str] | None = None) -> Response:
        browser = self._access.browser(request) or ""
        title = HTTPStatus(status).phrase
        context = {**self._base(self._access.person(request), browser), "status": status, "title": title}
        return HTMLResponse(render("error.html", {**context, "words": words}), status, headers)


async def _form_of(request: Request) -> dict[str, str]:
    """The fields of a form; of a name that came twice, the last. Raises _Refused."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise _Refused(415, "Forms are sent as application/x-www-form-urlencoded.")
    body = bytearray()
    try:
        async with asyncio.timeout(_READING):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _LARGEST_FORM:
                    raise _Refused(413, f"A form has {_LARGEST_FORM} bytes at most.")
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=1000))
    except TimeoutError:
        raise _Refused(408, "The form did not come in time.") from None
    except ValueError:
        raise _Refused(400, "The form cannot be read.") from None


def _local(path: str, otherwise: str) -> str:
    """A path of ours; never the address of another server."""
    is_ours = path.startswith("/") and not path.startswith("//") and "\\" not in path and path.isprintable()
    return path if is_ours else otherwise
