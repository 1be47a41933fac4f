"""What a broker has of what the settings need; told by every sink and queue, shown by `pgbridge topology`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Declaration:
    """One thing that must stand on a broker."""

    kind: str
    """``exchange``, ``queue``, ``binding``, ``stream``, ``consumer``, ``topic``, ``subscription``."""
    name: str
    state: Literal["present", "missing", "declared", "differs"]
    detail: str = ""
    """What it is declared with; for ``differs``, what is in the way and how to mend it."""
