"""Which of our extras brings a package that is missing."""

import re
from importlib.metadata import PackageNotFoundError, requires
from typing import Final

_REQUIREMENT: Final = re.compile(r"""([\w.-]+).*;.*\bextra == ['"](\w+)['"]""")

_COLLECTIONS: Final = ("dev", "demo")
"""Extras that bring packages of others."""


def how_to_install(module: str) -> str | None:
    """The command that installs a module's package, such as ``pip install 'pgbridge[payments]'``; None for one that no
    extra of ours brings, or where pgbridge itself is not installed."""
    package = module.partition(".")[0].replace("_", "-").lower()
    try:
        wanted = requires("pgbridge") or []
    except PackageNotFoundError:
        return None
    for requirement in wanted:
        found = _REQUIREMENT.match(requirement)
        if found and found[1].lower() == package and found[2] not in _COLLECTIONS:
            return f"pip install 'pgbridge[{found[2]}]'"
    return None
