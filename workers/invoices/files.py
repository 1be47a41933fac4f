"""Files that a worker writes: names that neither collide nor leave their folder, and writes that are never partial."""

import hashlib
import os
import secrets
from pathlib import Path
from typing import Final
from urllib.parse import quote

_LONGEST_STEM: Final = 180
"""Bytes of a name without suffix; a name may have 255, and the temporary one is longer."""


def file_name(name: str, suffix: str) -> str:
    """A file name for `name`, such as an invoice's number; different names get different files.

    Letters and digits of ASCII, ``-``, ``_`` and ``.`` stay, everything else and a leading dot are percent-encoded
    (RFC 3986). A name too long for a file ends in ``+`` and its SHA-256; no other name holds a ``+``.
    Raises ValueError for an empty name.
    """
    if not name:
        raise ValueError("a file needs a name that is not empty")
    stem = quote(name, safe="").replace("~", "%7E")
    if stem.startswith("."):
        stem = "%2E" + stem[1:]
    if len(stem) > _LONGEST_STEM:
        digest = hashlib.sha256(name.encode()).hexdigest()
        stem = f"{stem[: _LONGEST_STEM - len(digest) - 1]}+{digest}"
    return stem + suffix


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file at `path`: after a crash it holds the old or the new content, and never a part.

    Raises OSError; the folder is as before then.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
