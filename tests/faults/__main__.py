"""`python -m tests.faults`: the long form, on servers of its own, durable ones."""

import argparse
import asyncio
import logging
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from tests.faults.report import Report
from tests.faults.run import deck, play
from tests.support.servers import PostgresServer, RabbitMQServer


async def _run(folder: Path, faults: int, seed: int, seconds: float | None) -> Report:
    with PostgresServer(folder) as postgres, RabbitMQServer(folder) as rabbitmq:
        return await play(postgres, rabbitmq, folder, deck(faults, seed), seed, seconds, say=True)


def main() -> int:
    """The exit code: 1 when anything was lost, repeated to the database, or out of order."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, help="of the random choices; printed when left out")
    parser.add_argument("--seconds", type=float, help="ends the faults early after so many seconds")
    parser.add_argument("--report", type=Path, default=Path("build/faults.json"), help="default: build/faults.json")
    wanted = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if wanted.seed is None else wanted.seed
    print(f"seed {seed}; repeat with: python -m tests.faults --faults {wanted.faults} --seed {seed}", flush=True)
    # aio-pika tells every attempt of the audit to come back to a broker that was killed.
    logging.disable()
    folder = Path(tempfile.mkdtemp(prefix="pgbridge-faults-"))
    folder.chmod(0o755)
    report = asyncio.run(_run(folder, wanted.faults, seed, wanted.seconds))
    report.write(wanted.report)
    report.show()
    if report.passed:
        shutil.rmtree(folder)
        return 0
    print(f"FAILED; the logs are in {folder}, the counts in {wanted.report}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
