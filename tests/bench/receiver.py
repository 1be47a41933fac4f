"""`python -m tests.bench.receiver`: an endpoint of webhooks that costs little; what a path begins with is what it does.

``/ok``: 204 at once; ``/fail``: 500; ``/hang``: no answer ever. It prints its port, and ends when its standard input
does. A process of its own, so that it takes no time from what is measured.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

from tests.support.servers import free_port

ENDPOINTS = 100
"""That have an address."""

_OK = b"HTTP/1.1 204 No Content\r\n\r\n"
_FAIL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


@contextmanager
def receiving() -> Iterator[str]:
    """What `str.format` makes the beginning of URLs of, with the number of an endpoint: each has an address of its own,
    as it would have in the world. It runs as long as the block does."""
    command = [sys.executable, "-m", "tests.bench.receiver"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.1.{{}}:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            if head.startswith(b"POST /hang"):
                await reader.read()  # until the client leaves
                return
            writer.write(_OK if head.startswith(b"POST /ok") else _FAIL)
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


async def main() -> None:
    port = free_port()
    addresses = [f"127.0.1.{number}" for number in range(1, ENDPOINTS + 1)]
    await asyncio.start_server(_serve, addresses, port, backlog=1024)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())
