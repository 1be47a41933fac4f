"""The process that typesets: reads requests on stdin, answers each on stdout, and ends with its stdin.

`rendering.py` runs this file as a script, so that it starts in some tens of milliseconds: it imports nothing of ours.
A template that needs more memory than allowed ends this process only; the time is the parent's to watch.

    request:  length (4 bytes, big endian), JSON {"data": text, "time": ISO 8601}
    answer:   b"P" or b"E", length (4 bytes), the PDF or Typst's diagnostic
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from datetime import datetime

import typst

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves the settings in argv: parent, template, font_paths, system_fonts and memory (bytes)."""
    settings = json.loads(sys.argv[1])
    _end_with(settings["parent"])
    # Signals to a terminal's or a unit's processes are the parent's: what it has in hand may finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not RLIMIT_AS: mapped fonts and reserved address space are no memory.
    resource.setrlimit(resource.RLIMIT_DATA, (settings["memory"], settings["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Searching the system's folders takes longer than typesetting, so it is done once.
    fonts = typst.Fonts(include_system_fonts=settings["system_fonts"], font_paths=settings["font_paths"])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while header := requests.read(4):
        request = json.loads(requests.read(struct.unpack(">I", header)[0]))
        kind, body = _answer(request, settings["template"], fonts)
        answers.write(struct.pack(">cI", kind, len(body)) + body)
        answers.flush()


def _answer(request: dict[str, str], template: str, fonts: typst.Fonts) -> tuple[bytes, bytes]:
    try:
        pdf = typst.compile(
            template,
            font_paths=fonts,
            sys_inputs={"data": request["data"]},
            # Typst refuses fractions of a second.
            timestamp=datetime.fromisoformat(request["time"]).replace(microsecond=0),
            # An archive's format, and the only one for which Typst tells that a font lacks a character.
            pdf_standards=["a-3b"],
        )
    except typst.TypstError as error:
        return b"E", (error.diagnostic.strip() or error.message).encode()
    return b"P", pdf


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, in whatever way, even in the middle of a page."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent died before")


if __name__ == "__main__":
    main()
