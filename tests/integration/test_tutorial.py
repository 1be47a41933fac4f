"""docs/tutorial.md and docs/missing.md, followed to the letter: commands run in order, and what they show is printed.

Ports are those that are free here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.reader import Page, Reader
from tests.support.tutorial import followed

MISSING: Final = Page("missing.md")

BRIDGE: Final = "pgbridge run"
LEADS: Final = ["... bridge.leading ..."]


@pytest.fixture(scope="module")
def reader(server_folder: Path) -> Iterator[Reader]:
    """One who has followed the tutorial; all of it still runs."""
    with followed(server_folder / "tutorial") as reader:
        yield reader


def test_the_tutorial_leads_to_a_worker_that_handles_an_event(reader: Reader) -> None:
    assert reader.written == ["bridge.toml", "shop.sql"], "`pgbridge-worker new` writes the others"


def test_what_became_of_an_event_that_did_not_arrive_is_said_for_each_reason(reader: Reader) -> None:
    reader.page = MISSING
    headings = MISSING.headings()
    for heading in headings:
        no_bridge = heading == "The sink has not come to it"
        if no_bridge:
            reader.stop(BRIDGE)
        for block in MISSING.blocks(heading):
            reader.follow(block)
            if block.lines[0].startswith("$ pgbridge pause"):
                reader.wait_for(BRIDGE, ["... sink.paused ..."])
        if no_bridge:
            reader.start(BRIDGE, LEADS)
    assert len(headings) == 9
