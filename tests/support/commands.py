"""What tests of the operator's commands share."""

import asyncio
import json
from typing import Any

from tests.support.daemons import run_command


async def command(*arguments: str, expect: int = 0) -> tuple[str, str]:
    """Standard output and error of `pgbridge ...`, which must end with this exit code."""
    done = await asyncio.to_thread(run_command, *arguments)
    assert done.returncode == expect, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


async def json_of(*arguments: str, expect: int = 0) -> Any:
    """The JSON that a command prints."""
    out, _ = await command(*arguments, "--json", expect=expect)
    return json.loads(out)
