"""docs/tutorial.md and docs/missing.md, followed to the letter: commands run in order, and what they show is printed.

Ports are those that are free here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.reader import Page, Reader
from tests.support.servers import free_port

TUTORIAL: Final = Page("tutorial.md")
MISSING: Final = Page("missing.md")

BRIDGE: Final = "pgbridge run"
TAIL_READS: Final = (
    'psql -At $DB -c "select count(*) from pg_stat_activity'
    " where application_name = 'pgbridge tail' and query like '%read_page%'\""
)
"""What tells that it shows events from now on."""
LEADS: Final = ["... bridge.leading ..."]


@pytest.fixture(scope="module")
def reader(server_folder: Path) -> Iterator[Reader]:
    """One who has followed the tutorial; all of it still runs."""
    folder = server_folder / "tutorial"
    folder.mkdir()
    places = {port: str(free_port()) for port in ("15432", "14222")}
    with Reader(TUTORIAL, folder, pip="install pgbridge[demo] pytest", places=places) as reader:
        for heading in ("Install", "The first event", "The first worker", "What happens to a bad one"):
            for block in TUTORIAL.blocks(heading):
                reader.follow(block)
                if block.lines[0] == "$ pgbridge tail":
                    reader.look_until(TAIL_READS, ["1"])
        reader.stop("pgbridge tail")
        yield reader
        reader.stop()


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
