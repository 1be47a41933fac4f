"""The pages, as they are read in the repository: their links lead somewhere, and what is generated is up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import ROOT
from tests.support.pages import PAGES, anchors, prose


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match("https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_the_start_of_docs_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w.]+\.md)", (ROOT / "docs" / "README.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_page_of_commands_is_the_one_generated_from_them(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "deploy" / "commands_page.py"), str(tmp_path)]
    subprocess.run(program, check=True, env={"PYTHONPATH": str(ROOT)})
    assert (ROOT / "docs" / "commands.md").read_text() == (tmp_path / "commands.md").read_text(), "run: make docs"
