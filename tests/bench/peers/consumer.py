"""A consumer that does nothing but read frames and note when each body came: the least that any worker could take.

Bodies are JSON with the time of the event in `t`. On SIGUSR1, and then once a second, it writes what it noted.
"""

import json
import select
import signal
import sys
import time
from pathlib import Path

from pamqp import commands

from tests.bench.handlers import RECORD
from tests.bench.peers.frames import Broker

_BODY = 3


def main(url: str, queue: str, path: str) -> None:
    broker = Broker(url)
    flushing = False

    def flush(*_: object) -> None:
        nonlocal flushing
        flushing = True

    signal.signal(signal.SIGUSR1, flush)
    broker.call(1, commands.Basic.Consume(queue=queue, no_ack=True))
    print("consuming", flush=True)
    buffer = broker.rest
    with Path(path).open("ab", buffering=1 << 20) as file:
        while True:
            readable, _, _ = select.select([broker.socket], [], [], 0.1)
            if flushing:
                file.flush()
            if not readable:
                continue
            data = broker.socket.recv(1 << 18)
            now = time.time()
            if not data:
                raise RuntimeError("the broker ended the connection")
            buffer += data
            start = 0
            while len(buffer) - start >= 7:
                end = start + 8 + int.from_bytes(buffer[start + 3 : start + 7])
                if end > len(buffer):
                    break
                if buffer[start] == _BODY:
                    body = json.loads(buffer[start + 7 : end - 1])
                    file.write(RECORD.pack(body["t"], now, body["client"], body["n"]))
                start = end
            buffer = buffer[start:]


if __name__ == "__main__":
    main(*sys.argv[1:4])
