"""The codes of dead letters are one set, in the code, in the metrics and in the documentation."""

import ast
import re
from collections.abc import Iterator

from bridge.process.metrics import CODES, NO_ROUTE
from tests.support.environment import ROOT


def given() -> Iterator[str]:
    """The codes that are written where an event is given up."""
    for path in (ROOT / "bridge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Never", "Unsendable")
            ):
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    yield str(code.value)


def test_each_code_that_an_event_is_given_up_with_is_counted_from_the_start() -> None:
    assert set(given()) == set(CODES)


def test_the_documentation_says_of_each_code_what_it_needs() -> None:
    rows = re.findall(r"^\| `(\w+)` \| outbox \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted((*CODES, NO_ROUTE))
