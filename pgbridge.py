"""What the commands `pgbridge` and `pgbridge-worker` start with: packages named as ours must not stand in our way.

`bridge` and `workers` are plain words, and a project may have packages of these names. One that Python finds before
ours, in a folder of PYTHONPATH or in the current one, would end every command in an import error about our own modules.
This module has a name that nobody else uses, imports nothing of ours before it has looked, and says in one sentence
what is in the way.
"""

import os
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType
from typing import Final

OURS: Final = ("bridge", "workers")
"""The packages that are installed beside this file."""

EXIT_CODE: Final = 78
"""Of a SettingsError, which cannot be imported here."""


def main() -> None:
    """`pgbridge`."""
    end_when_asked()
    require_ours("pgbridge")
    from bridge.cli import main as group

    group(prog_name="pgbridge")


def worker_main() -> None:
    """`pgbridge-worker`."""
    end_when_asked()
    require_ours("pgbridge-worker")
    from workers.cli import main as group

    group(prog_name="pgbridge-worker")


def end_when_asked() -> None:
    """As the first process of a container, ends on SIGTERM as any other process does.

    To that one the kernel does nothing on a signal without a handler, and daemons have theirs only once they run.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def require_ours(program: str) -> None:
    """Ends the process with one sentence where Python finds other packages under our names."""
    for name in OURS:
        other = found_instead(name)
        if other is not None:
            print(f"{program}: {in_the_way(name, other)}, or take its folder off PYTHONPATH", file=sys.stderr)
            sys.exit(EXIT_CODE)


def found_instead(name: str) -> Path | None:
    """Where Python finds another package or module than ours under this name of ours; None where it finds ours."""
    spec = PathFinder.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).resolve()
    place = place.parent if place.name == "__init__.py" else place
    return None if place.parent == Path(__file__).resolve().parent else place


def in_the_way(name: str, other: Path) -> str:
    """The sentence about it."""
    return f"{other} stands in the way of pgbridge's own package `{name}`: rename it"
