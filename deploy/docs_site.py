"""What MkDocs calls while it builds the documentation's site (mkdocs.yml).

Pages are written to be read in the repository, where a link is the path of a file. On the site such a path is one of:

- a page: those of docs/, and those of the top folder, which get the names in `PAGES`;
- a picture, or another file of docs/, which MkDocs copies;
- any other file of the repository, or a folder: a page below `files/` that shows its text, or what is in it. There is
  one for each that a page links to, and for all that is in such a folder, as long as Git knows it: what is not under
  version control may be a secret.
"""

import posixpath
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT: Final = Path(__file__).parents[1]

PAGES: Final = {
    "README.md": "overview.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""The site's name of each page that is not in docs/."""

DECISIONS: Final = "decisions.md"
"""A page of its own on the site: the second part of ARCHITECTURE.md."""

_SOURCES: Final = {name: source for source, name in PAGES.items()} | {DECISIONS: "ARCHITECTURE.md"}

_LINK: Final = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
_NUMBER: Final = re.compile(r"^(\d+)\. ", re.MULTILINE)
_MARK: Final = "\N{INVISIBLE SEPARATOR}"
"""Stands around the number of a decision in its text until it is that of its item: lists number themselves."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and the style."""
    files.append(File.generated(config, "docs_site.css", abs_src_path=str(ROOT / "deploy" / "docs_site.css")))
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "ARCHITECTURE.md":
            text, _, decisions = text.partition("\n## Decisions\n")
            text += f"\n## Decisions\n\nThey have [a page of their own]({DECISIONS}).\n"
            files.append(File.generated(config, DECISIONS, content=f"# Decisions\n{decisions}"))
        files.append(File.generated(config, name, content=text))
    shown: set[str] = set()
    for file in files.documentation_pages():
        for path in links(source_of(file.src_uri), file.content_string):
            shown |= _with_all_below(path)
    for path in sorted(shown):
        text = _text_of(path) if path in known_to_git() else _listing(path)
        files.append(File.generated(config, page_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to pages, and what tables say into what this Markdown reads."""
    name = page.file.src_uri
    if name.startswith("files/"):
        return markdown

    def turned(found: re.Match[str]) -> str:
        path = _in_repository(source_of(name), found[1])
        target = None if path is None else _site_name(path)
        if target is None or files.get_file_from_path(target) is None:
            return found[0]  # MkDocs says what is wrong with it
        return f"]({posixpath.relpath(target, posixpath.dirname(name) or '.')}{found[2] or ''})"

    markdown = _LINK.sub(turned, markdown)
    if name == DECISIONS:
        markdown = _NUMBER.sub(rf"\1. {_MARK}\1{_MARK}", markdown)
    return "\n".join(_cells(line) if line.lstrip().startswith("|") else line for line in markdown.split("\n"))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Gives decisions their own numbers, also where one is left out."""
    if page.file.src_uri != DECISIONS:
        return html
    return re.sub(rf"<li>(\s*(?:<p>)?){_MARK}(\d+){_MARK}", r'<li id="decision-\2" value="\2">\1', html)


def source_of(name: str) -> str:
    """The file of the repository that a page of the site is."""
    return _SOURCES.get(name, f"docs/{name}")


def links(source: str, text: str) -> Iterator[str]:
    """The files and folders of the repository that a page links to, and that are no pages, as paths from its top."""
    for found in _LINK.finditer(text):
        path = _in_repository(source, found[1])
        if path is not None and path not in PAGES and not path.startswith("docs/"):
            yield path


def _in_repository(source: str, link: str) -> str | None:
    """What a link of a page means, as a path from the top of the repository; None where it leads out of that."""
    if re.match(r"[a-z]+:", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return None if path.startswith(("..", "/")) or not (ROOT / path).exists() else path


def _site_name(path: str) -> str:
    """The site's name of what is at this path."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else page_of(path)


def page_of(path: str) -> str:
    """The site's name of the page that shows a file or a folder."""
    return f"files/{path}.md" if path in known_to_git() else f"files/{path}/index.md"


def _with_all_below(path: str) -> set[str]:
    """A file; or a folder with all that is in it. Nothing where Git knows neither."""
    if path in known_to_git():
        return {path}
    inside = {name for name in known_to_git() if name.startswith(f"{path}/")}
    folders = {parent.as_posix() for name in inside for parent in Path(name).parents}
    return inside | {folder for folder in folders if folder == path or folder.startswith(f"{path}/")}


def _listing(path: str) -> str:
    """The page of a folder."""
    inside = [name.removeprefix(f"{path}/") for name in known_to_git() if name.startswith(f"{path}/")]
    lines = []
    for name in sorted({name.partition("/")[0] for name in inside}):
        is_file = name in inside
        lines.append(f"- [`{name}{'' if is_file else '/'}`]({name}{'.md' if is_file else '/index.md'})")
    return "\n".join([*_head(f"{path}/"), *lines, ""])


def _text_of(path: str) -> str:
    """The page of a file."""
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PluginError(
            f"{path}: a page links to it, or to its folder, and it is no text that could be shown"
        ) from error
    try:
        language = get_lexer_for_filename(path).aliases[0]
    except ClassNotFound:
        language = "text"
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", f"` {text}")))
    return "\n".join([*_head(path), f"{fence}{language}", text.rstrip("\n"), fence, ""])


def _head(title: str) -> list[str]:
    return ["---", "search:", "  exclude: true", "hide: [toc]", "---", "", f"# `{title}`", ""]


def _cells(row: str) -> str:
    """A row of a table. In the repository a bar within code is escaped; here code is not looked into."""
    return re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), row)


@cache
def known_to_git() -> frozenset[str]:
    """The files under version control, as paths from the top. Raises PluginError where Git cannot tell."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PluginError(f"the site is built in a clone, where Git says what may be shown: {done.stderr.strip()}")
    return frozenset(done.stdout.split("\0")[:-1])
