"""The event that a PDF was made for, kept in the PDF itself, so that the two appear and vanish together.

It is a comment behind the last cross-reference table, where neither a template nor a payload can write, no offset
changes, and every reader ignores it. A program that rewrites the file may drop it.
"""

import re
from typing import Final

_END: Final = b"startxref\n"
_COMMENT: Final = re.compile(rb"\n%pgbridge-event ([0-9a-f-]{36})\n" + _END + rb"\d+\n%%EOF\s*\Z")


def stamped(pdf: bytes, event_id: str) -> bytes:
    """The PDF, saying which event it was made for. Raises ValueError for something else than a PDF."""
    table, end, offset = pdf.rpartition(_END)
    content = table.removesuffix(b"\n") + f"\n%pgbridge-event {event_id}\n".encode() + end + offset
    if event_of(content) != event_id:
        raise ValueError("this is not the end of a PDF, or not the id of an event")
    return content


def event_of(pdf: bytes) -> str | None:
    """The event that a PDF was made for; None for a file of other origin."""
    found = _COMMENT.search(pdf, max(0, len(pdf) - 200))
    return found[1].decode() if found else None
