"""What tests of the operator's commands share."""

import asyncio
import json
from typing import Any

import pytest

from tests.support.daemons import run_command
from tests.support.messages import execute


async def command(*arguments: str, expect: int = 0) -> tuple[str, str]:
    """Standard output and error of `pgbridge ...`, which must end with this exit code."""
    done = await asyncio.to_thread(run_command, *arguments)
    assert done.returncode == expect, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


async def json_of(*arguments: str, expect: int = 0) -> Any:
    """The JSON that a command prints."""
    out, _ = await command(*arguments, "--json", expect=expect)
    return json.loads(out)


async def eventually(dsn: str, query: str, wanted: list[tuple[Any, ...]], timeout: float = 20.0) -> None:
    """Waits until a query gives these rows."""
    rows: list[tuple[Any, ...]] = []
    try:
        async with asyncio.timeout(timeout):
            while (rows := await execute(dsn, query)) != wanted:
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"{query}\ngives {rows}, not {wanted}")
