"""How a command ends: with the exit code of its error, and the error's message in place of a stack trace."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from bridge.errors import PgbridgeError

P = ParamSpec("P")


def exit_codes(command: Callable[P, None]) -> Callable[P, None]:
    """For click commands: a PgbridgeError becomes one message on standard error, and its `exit_code`."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PgbridgeError as error:
            print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    return run
