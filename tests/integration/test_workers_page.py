"""docs/workers.md, followed to the letter: its commands run in order, and what it shows is what they print.

The addresses of the test's own servers are written into bridge.toml.
"""

import re
from pathlib import Path
from typing import Final

import pytest

from tests.support.reader import Page, Reader, shows
from tests.support.servers import RabbitMQServer

PAGE: Final = Page("workers.md")


@pytest.mark.rabbitmq
def test_from_nothing_to_a_running_worker(tmp_path: Path, database: str, rabbitmq: RabbitMQServer, unique: str) -> None:
    rabbitmq.ctl("add_vhost", unique)
    rabbitmq.ctl("set_permissions", "-p", unique, "guest", ".*", ".*", ".*")
    languages = []
    with Reader(PAGE, tmp_path) as reader:
        for block in PAGE.blocks("From nothing to a running worker"):
            reader.follow(block)
            languages.append(block.language)
            if block.file == "bridge.toml":
                settings = tmp_path / "shop" / "bridge.toml"
                text = settings.read_text()
                for key, ours in (("dsn", database), ("url", f"{rabbitmq.url.rstrip('/')}/{unique}")):
                    text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{ours}"', text, flags=re.MULTILINE)
                    assert count == 1
                settings.write_text(text)
        reader.stop()
    assert reader.written == [], "`pgbridge-worker new` writes them"
    assert languages == ["console", "python", "python", "console", "console", "toml", *["console"] * 4]


def test_the_examples_of_handlers_and_tests_pass(tmp_path: Path) -> None:
    with Reader(PAGE, tmp_path) as reader:
        for command in ("python3.11 -m venv .venv", ". .venv/bin/activate", "pip install pgbridge pytest"):
            printed, code = reader.type(command)
            assert code == 0, printed
        names = []
        for heading in ("Writing one", "Testing it"):
            for block in PAGE.blocks(heading):
                if block.language == "python" and block.file is not None:
                    (tmp_path / block.file).write_text(block.content)
                    names.append(block.file)
        assert names == ["reserve.py", "test_reserve.py", "test_charge.py"]
        printed, code = reader.type("pytest -q")
    assert code == 0, printed
    assert printed[-1].startswith("3 passed")


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (["took 0.61s"], ["took 12.5s"], True),
        (["a", "...", "c"], ["a", "b", "b", "c"], True),
        (["a", "...", "c"], ["a", "c"], True),
        (["a", "...", "c"], ["a", "b", "d"], False),
        (["a ... c"], ["a b c"], True),
        (["a"], ["a", "b"], False),
        (["a.c"], ["abc"], False),
    ],
)
def test_what_the_page_shows_is_compared(expected: list[str], printed: list[str], same: bool) -> None:
    assert shows(expected, printed) == same
