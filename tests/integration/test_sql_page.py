"""docs/sql.md has the functions that the database has, as their comments say.

`UPDATE_PAGES=1 pytest tests/integration/test_sql_page.py` writes its tables anew.
"""

import os
import re
from typing import Final

from tests.support.environment import ROOT
from tests.support.messages import execute

PAGE: Final = ROOT / "docs" / "sql.md"

FUNCTIONS: Final = """
select proname, pg_get_function_arguments(oid), pg_get_function_result(oid), obj_description(oid, 'pg_proc'),
  has_function_privilege('bridge_emitter', oid, 'execute'), has_function_privilege('bridge_operator', oid, 'execute')
from pg_proc where pronamespace = 'bridge'::regnamespace order by proname, pg_get_function_arguments(oid)
"""


def cell(value: object) -> str:
    """Types by their short names, and defaults without theirs, which is that of the argument."""
    text = str(value).replace("timestamp with time zone", "timestamptz").replace("double precision", "float8")
    text = re.sub(r"(DEFAULT (?:'[^']*'|\w+))::[\w ]+(?:\[\])?", r"\1", text)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


async def test_the_page_lists_the_functions_of_authors_and_operators(bridge_database: str) -> None:
    tables: dict[str, list[str]] = {"bridge_emitter": [], "bridge_operator": []}
    for name, arguments, result, comment, emits, operates in await execute(bridge_database, FUNCTIONS):
        if emits:
            assert comment, f"bridge.{name}() is for authors, and says nothing of itself"
        if comment and (emits or operates):
            row = f"| `bridge.{name}({cell(arguments)})` | `{cell(result)}` | {cell(comment)} |\n"
            tables["bridge_emitter" if emits else "bridge_operator"].append(row)
    page = PAGE.read_text()
    for role, rows in tables.items():
        head, count = re.subn(
            rf"(## For members of `{role}`\n(?:(?!\|).*\n)*\| function .*\n\|---.*\n)(?:\|.*\n)*",
            lambda found, rows=rows: found[1] + "".join(rows),  # type: ignore[misc]
            page,
        )
        assert count == 1
        if os.environ.get("UPDATE_PAGES"):
            PAGE.write_text(head)
        else:
            assert head == page, "run: UPDATE_PAGES=1 pytest tests/integration/test_sql_page.py"
        page = head
