"""The console in a test: served in the test's own event loop, asked over HTTP as a browser would."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import httpx

from bridge.console.server import Console
from bridge.settings import Settings, load
from tests.support.servers import free_port

TOKEN: Final = "operator-token-0123456789"
VIEWER_TOKEN: Final = "viewer-token-0123456789ab"
TOKENS: Final = f'token = "{TOKEN}"\nviewer_token = "{VIEWER_TOKEN}"'


def console_settings(folder: Path, dsn: str, console: str = "", more: str = "") -> Settings:
    """Settings of a bridge with two sinks that need no server, and of its console at a free port of loopback."""
    text = (
        f'name = "test"\n[postgres]\ndsn = "{dsn}"\n'
        '[sinks.events]\ntype = "memory"\n[sinks.other]\ntype = "memory"\n'
        '[[routes]]\ntopic = "#"\nsink = "events"\n[[routes]]\ntopic = "other.#"\nsink = "other"\n'
        f'[observe]\nlog_format = "json"\n{more}\n[console]\ninterval = "100ms"\n'
    )
    if "listen" not in console:
        text += f'listen = "127.0.0.1:{free_port()}"\n'
    config = folder / "bridge.toml"
    config.write_text(text + console)
    return load(config, environ={})


class Page(HTMLParser):
    """What a page says: its words, the fields of its forms, and how its figures are called."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self._words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._words.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self._words).split())

    def field(self, name: str) -> str:
        """The value of a form's field."""
        [value, *_] = [attributes["value"] for tag, attributes in self.tags if attributes.get("name") == name]
        return value or ""

    @property
    def forms(self) -> list[str | None]:
        return [attributes.get("action") for tag, attributes in self.tags if tag == "form"]


class Browser(httpx.AsyncClient):
    """Keeps cookies; goes nowhere by itself."""

    def __init__(self, base: str, headers: Mapping[str, str] | None = None) -> None:
        # Without TLS it need not read all certificates of the system, which takes longer than a test.
        super().__init__(base_url=base, headers=headers, verify=False)

    async def page(self, path: str) -> Page:
        answer = await self.get(path)
        assert answer.status_code == 200, answer.text
        return Page(answer.text)

    async def fill(self, path: str, form: Mapping[str, str], *, of: str) -> httpx.Response:
        """Sends a form of the page `of`."""
        token = (await self.page(of)).field("form_token")
        return await self.post(path, data={"form_token": token, **form})

    async def log_in(self, token: str, name: str = "anna") -> httpx.Response:
        return await self.fill("/login", {"name": name, "token": token, "back": "/"}, of="/login")


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[tuple[Console, str, asyncio.Event]]:
    """A console that serves, its address, and what stops it."""
    console = Console(settings)
    stop = asyncio.Event()
    running = asyncio.create_task(console.run(stop))
    base = f"http://{settings.console.listen}"
    try:
        async with Browser(base) as client, asyncio.timeout(20):
            while True:
                if running.done():
                    await running
                try:
                    await client.get(f"{base}/static/console.css")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.01)
        yield console, base, stop
    finally:
        stop.set()
        await running


@asynccontextmanager
async def browsing(settings: Settings, headers: Mapping[str, str] | None = None) -> AsyncIterator[Browser]:
    """A browser before a console."""
    async with served(settings) as (_, base, _), Browser(base, headers) as browser:
        yield browser


async def events_of(browser: Browser, path: str) -> AsyncGenerator[str, None]:
    """The renewals of a live page."""
    async with browser.stream("GET", path, timeout=30) as answer:
        assert answer.status_code == 200
        lines: list[str] = []
        async for line in answer.aiter_lines():
            if line:
                lines.append(re.sub("^data: ?", "", line))
            else:
                yield "\n".join(lines)
                lines = []
