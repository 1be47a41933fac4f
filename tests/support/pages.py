"""The project's pages: Markdown that is read in the repository, and on the site that `make docs-site` builds of it."""

import re
from pathlib import Path
from typing import Final

from tests.support.environment import ROOT

PAGES: Final = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]


def prose(page: Path) -> str:
    """A page without its fenced blocks, in which a comment looks like a heading."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
