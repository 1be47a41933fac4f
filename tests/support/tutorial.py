"""docs/tutorial.md, followed to the letter, at ports that are free here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.reader import Page, Reader
from tests.support.servers import free_port

TUTORIAL: Final = Page("tutorial.md")
_HEADINGS: Final = ("Install", "The first event", "The first worker", "What happens to a bad one")
_TAIL_READS: Final = (
    'psql -At $DB -c "select count(*) from pg_stat_activity'
    " where application_name = 'pgbridge tail' and query like '%read_page%'\""
)
"""What tells that it shows events from now on."""


@contextmanager
def followed(folder: Path, **options: str) -> Iterator[Reader]:
    """One who has followed it in `folder`, a new one; all but `pgbridge tail` still runs. `options`: the Reader's."""
    folder.mkdir()
    places = {port: str(free_port()) for port in ("15432", "14222")}
    with Reader(TUTORIAL, folder, pip="install pgbridge[demo] pytest", places=places, **options) as reader:
        for heading in _HEADINGS:
            for block in TUTORIAL.blocks(heading):
                reader.follow(block)
                if block.lines[0] == "$ pgbridge tail":
                    reader.look_until(_TAIL_READS, ["1"])
        reader.stop("pgbridge tail")
        yield reader
        reader.stop()
