"""`python -m tests.bench.delay HOST PORT SECONDS`: a proxy process whose round trips take so long.

It prints its port, and ends when its standard input does. A process of its own, so that it takes no time from the
event loop that is measured.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import uvloop

from tests.support.proxy import Proxy


@contextmanager
def delayed(dsn: str, seconds: float) -> Iterator[str]:
    """A DSN that reaches the same server through such a proxy."""
    parts = urlsplit(dsn)
    command = [sys.executable, "-m", "tests.bench.delay", str(parts.hostname), str(parts.port), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield urlunsplit(parts._replace(netloc=f"{parts.username}@{parts.hostname}:{port}"))
    finally:
        process.kill()
        process.wait()


async def main(host: str, port: int, seconds: float) -> None:
    async with Proxy(host, port) as proxy:
        proxy.delay_to_server = proxy.delay_to_client = seconds / 2
        print(proxy.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
