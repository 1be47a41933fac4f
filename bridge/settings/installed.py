"""What is installed and says so by an entry point: brokers, what the workers want of them, templates."""

from functools import cache
from importlib.metadata import EntryPoints, entry_points


@cache
def points(group: str) -> EntryPoints:
    """The entry points of a group. They are looked for once: a look reads a file of every distribution that is there,
    and a `pgbridge check` that made seven looks spent half of its processor time on them."""
    return entry_points(group=group)
