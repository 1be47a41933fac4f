"""The documentation's site: it builds without a warning, says what the repository says, and needs no other server."""

import json
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from tests.support.environment import ROOT

NAMES: Final = {"README.md": "overview", "CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing"}
"""Of the pages that are not in docs/ and that are one page on the site."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, which was built strictly: a bad link or heading, or a page left out, ends with 1."""
    folder = tmp_path_factory.mktemp("site")
    code, said = build(ROOT, folder)
    assert code == 0, said
    return folder


def build(clone: Path, folder: Path) -> tuple[int, str]:
    """Builds the site as `make docs-site` does; its exit code, and what it said."""
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(program, cwd=clone, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_link_that_leads_nowhere_and_a_page_without_a_place_end_the_build(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in (
        ".gitignore",
        "docs",
        "deploy",
        "sql",
        "mkdocs.yml",
        "requirements.txt",
        *(path.name for path in ROOT.glob("*.md")),
    ):
        subprocess.run(["cp", "-r", str(ROOT / name), str(clone)], check=True)
    links = ["gone.md", "settings.md#gone", "#gone", "../deploy/gone.yml", "../deploy/gone/", "/settings.md"]
    with (clone / "docs" / "wire.md").open("a") as page:
        page.writelines(f"[link]({link})\n" for link in links)
    (clone / "docs" / "orphan.md").write_text("# Orphan\n")
    (clone / "deploy" / "secret").write_text("hunter2")
    subprocess.run(["git", "init", "--quiet"], cwd=clone, check=True)
    subprocess.run(["git", "add", "--all", ":!deploy/secret"], cwd=clone, check=True)
    code, said = build(clone, tmp_path / "site")
    assert code == 1
    assert f"Aborted with {len(links) + 1} warnings in strict mode!" in said
    assert [link for link in links if f"'{link}'" not in said] == []
    assert "orphan.md" in said
    assert not list((tmp_path / "site").rglob("*secret*")), "Git does not know it"


class Reading(HTMLParser):
    """What a person reads: the words, and of which blocks they are."""

    BLOCKS: Final = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "tr", "th", "td", "ul", "ol", "li"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self._words = ""
        self._silent = False
        self.feed(text)
        self._end()

    def _end(self) -> None:
        self.said += self._words.split()
        self._words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent = "headerlink" in (dict(attrs).get("class") or "")
        if tag in self.BLOCKS or tag == "p":
            self._end()
        if tag in self.BLOCKS:
            self.said.append(f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False
        if tag in self.BLOCKS or tag == "p":
            self._end()

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._words += data


class Addresses(HTMLParser):
    """The addresses of a page: of what a browser loads with it, and of where its links lead; and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found["href"])
        elif "src" in found:
            self.loaded.append(found["src"])
        elif tag == "a" and "href" in found:
            self.links.append(found["href"])


def in_repository(markdown: str) -> list[str]:
    return Reading(MarkdownIt("commonmark").enable("table").render(markdown)).said


def on_site(page: Path) -> list[str]:
    [article] = re.findall(r"<article.*?</article>", page.read_text(), re.DOTALL)
    return Reading(re.sub("\N{INVISIBLE SEPARATOR}", "", article)).said


@cache
def addresses(page: Path) -> Addresses:
    return Addresses(page.read_text())


def pages(site: Path) -> Iterator[Path]:
    return site.rglob("*.html")


def sources() -> Mapping[str, Path]:
    """By the site's name of a page, its file."""
    docs = {path.stem: path for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"}
    return {".": ROOT / "docs" / "README.md", **docs, **{NAMES[name]: ROOT / name for name in NAMES}}


@pytest.mark.parametrize("name", sources())
def test_a_page_says_what_it_says_in_the_repository(site: Path, name: str) -> None:
    assert on_site(site / name / "index.html") == in_repository(sources()[name].read_text())


def test_architecture_is_two_pages_and_each_decision_has_its_own_number(site: Path) -> None:
    before, heading, decisions = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Decisions\n")
    assert heading
    expected = in_repository(before)
    assert on_site(site / "architecture" / "index.html")[: len(expected)] == expected
    page = site / "decisions" / "index.html"
    assert on_site(page) == in_repository(f"# Decisions\n{decisions}")
    numbers = re.findall(r"^(\d+)\. ", decisions, re.MULTILINE)
    assert re.findall(r'<li id="decision-(\d+)" value="\d+">', page.read_text()) == numbers


def test_each_link_leads_to_a_page_and_a_heading_of_the_site(site: Path) -> None:
    for page in pages(site):
        if page.name == "404.html":
            continue
        for link in [*addresses(page).links, *addresses(page).loaded]:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https", f"{page}: {link}"
                continue
            target = Path(posixpath.normpath(page.parent / unquote(parts.path))) if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page}: {link}"
            assert not parts.fragment or parts.fragment in addresses(target).ids, f"{page}: {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    foreign = [(page, url) for page in pages(site) for url in addresses(page).loaded if urlsplit(url).netloc]
    styles = [*(path for path in site.rglob("*.css") if path.is_file()), *pages(site)]
    imports = [
        (style, url)
        for style in styles
        for url in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)", style.read_text())
    ]
    assert not foreign
    assert not imports


def test_the_search_knows_each_page_and_no_file_of_the_repository(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["location"].partition("#")[0].rstrip("/") for entry in index["docs"]}
    assert found == {name.removeprefix(".") for name in sources()} | {"architecture", "decisions"}


def test_files_that_pages_link_to_are_shown_and_secrets_are_not(site: Path) -> None:
    shown = {page.parent.relative_to(site / "files").as_posix() for page in pages(site / "files")}
    assert {"deploy", "deploy/kubernetes", "deploy/kubernetes/bridge.yaml", "sql/schema.sql"} <= shown
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    folders = {parent.as_posix() for name in tracked for parent in Path(name).parents}
    assert shown <= {*tracked, *folders}
    text = Reading((site / "files/deploy/kubernetes/bridge.yaml/index.html").read_text()).said
    assert set((ROOT / "deploy/kubernetes/bridge.yaml").read_text().split()) <= set(text)
