"""Who runs a command, for what is written down about it."""

import getpass
import os
import socket


def current_person() -> str:
    """``user@host``. A user without a name, as a container may have, is a number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # KeyError before Python 3.13
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
