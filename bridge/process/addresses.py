"""Whether a host is this machine."""

import contextlib
from ipaddress import ip_address


def is_here(host: str) -> bool:
    """Whether what is sent to this host stays on this machine: loopback, or the path of a socket."""
    if not host or host.startswith(("/", "@")) or host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ip_address(host.strip("[]")).is_loopback
    return False
