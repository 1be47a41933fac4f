"""`python -m tests.faults`: the long form, on servers of its own, durable ones."""

import argparse
import asyncio
import logging
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.faults.brokers import Nats, PubSub, RabbitMQ
from tests.faults.kinds import ALL, Kind
from tests.faults.report import Report
from tests.faults.run import deck, play
from tests.faults.world import POSTGRES
from tests.support.servers import NatsServer, PostgresServer, PubSubEmulator, RabbitMQServer


async def _run(folder: Path, broker: str, cards: list[Kind], seed: int, seconds: float | None) -> Report:
    playing = asyncio.current_task()
    assert playing is not None
    # As Ctrl-C does: else bridges and workers would live on.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, playing.cancel)
    with PostgresServer(folder, settings=POSTGRES) as postgres:
        if broker == "nats":
            with NatsServer(folder) as nats:
                return await play(postgres, Nats(nats), folder, cards, seed, seconds, say=True)
        if broker == "pubsub":
            with PubSubEmulator(folder) as emulator:
                return await play(postgres, PubSub(emulator), folder, cards, seed, seconds, say=True)
        with RabbitMQServer(folder) as rabbitmq:
            return await play(postgres, RabbitMQ(rabbitmq), folder, cards, seed, seconds, say=True)


def _one_seed(broker: str, faults: int, seed: int, only: str, seconds: float | None, report_file: Path) -> Report:
    cards = deck(faults, seed, broker, only)
    again = f"python -m tests.faults --broker {broker} --faults {faults} --seed {seed}" + (
        f" --only {only!r}" if only else ""
    )
    print(f"seed {seed}; repeat with: {again}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="pgbridge-faults-"))
    folder.chmod(0o755)
    report = asyncio.run(_run(folder, broker, cards, seed, seconds))
    report.write(report_file)
    report.show()
    if report.passed:
        shutil.rmtree(folder)
    else:
        print(f"FAILED; the logs are in {folder}, the counts in {report_file}", file=sys.stderr)
    return report


def main() -> int:
    """The exit code: 1 when anything was lost, repeated to the database, or out of order."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--broker", choices=ALL, default="rabbitmq", help="default: rabbitmq")
    parser.add_argument("--faults", type=int, default=100, help="how many for each seed (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, one after the other (default: 3)")
    parser.add_argument("--seed", type=int, help="the only seed of the random choices; printed when left out")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--seconds", type=float, help="ends the faults of a seed early after so many seconds")
    parser.add_argument("--report", type=Path, default=Path("build/faults.json"), help="default: build/faults.json")
    wanted = parser.parse_args()
    seeds = [secrets.randbelow(1_000_000) for _ in range(wanted.seeds)] if wanted.seed is None else [wanted.seed]
    # aio-pika logs every attempt of the audit to come back to a broker that was killed.
    logging.disable()
    reports = []
    for seed in seeds:
        file = wanted.report if len(seeds) == 1 else wanted.report.with_stem(f"{wanted.report.stem}-{seed}")
        reports.append(_one_seed(wanted.broker, wanted.faults, seed, wanted.only, wanted.seconds, file))
    if len(reports) > 1:
        print(*(f"{'passed' if report.passed else 'FAILED'}: {report.line}" for report in reports), sep="\n")
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
