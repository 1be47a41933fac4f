"""Serves until it is interrupted: for whoever wants to try pgbridge, and has no PostgreSQL or NATS at hand."""

import argparse
import signal
import sys
import time
from pathlib import Path

from bridge.demo.servers import NatsServer, PostgresServer
from bridge.errors import PgbridgeError, UnavailableError

parser = argparse.ArgumentParser(
    prog="python -m bridge.demo.servers",
    description="PostgreSQL and NATS JetStream of one's own, from Python wheels, on 127.0.0.1, until Ctrl-C.",
)
parser.add_argument("folder", type=Path, help="where they keep their data; made where it is missing")
parser.add_argument("--postgres", type=int, default=15432, metavar="PORT", help="PostgreSQL's (default: 15432)")
parser.add_argument("--nats", type=int, default=14222, metavar="PORT", help="NATS' (default: 14222)")
arguments = parser.parse_args()
# Ended by others as by Ctrl-C, and by Ctrl-C also where a shell has it ignored in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    postgres, nats = PostgresServer(arguments.folder), NatsServer(arguments.folder)
    postgres.port, nats.port = arguments.postgres, arguments.nats
    with postgres, nats:
        print(postgres.dsn(), nats.url, sep="\n", flush=True)
        while True:
            time.sleep(0.5)
            for server in (postgres, nats):
                if not server.running:
                    raise UnavailableError(f"{server.name} has ended; its log is {server.log}")
except KeyboardInterrupt:
    print("stopped", flush=True)
except PgbridgeError as error:
    print(f"{parser.prog}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
