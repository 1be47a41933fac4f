"""What `pgbridge check` prints, as if the terminal had no end."""

import re


def unwrapped(printed: str) -> str:
    """The lines, each whole."""
    return re.sub(r"\n +", " ", printed)
