"""The brokers that the demo runs on: how each is started, set in bridge.toml, and audited."""

import importlib.util
import json
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from bridge.demo import audit
from bridge.demo.audit import TARGET, Arrivals
from bridge.demo.servers import MissingProgramError, NatsServer, PubSubEmulator, RabbitMQServer, Server


@dataclass(frozen=True, slots=True)
class Broker:
    """One broker, not yet started."""

    title: str
    server: Server
    sink: str
    """Its lines in ``[sinks.events]`` of bridge.toml."""
    audited: Callable[[Arrivals], AbstractAsyncContextManager[None]]
    """Counts, within the context, all that arrives."""


def make_broker(kind: str, folder: Path) -> Broker:
    """The broker for ``--broker``: ``embedded``, ``rabbitmq`` or ``pubsub``.

    Raises MissingProgramError, saying what to install.
    """
    match kind:
        case "embedded":
            require("nats", "demo")
            nats = NatsServer(folder)
            sink = _toml(type="nats", url=nats.url, stream=TARGET)
            return Broker("NATS JetStream", nats, sink, lambda arrivals: audit.on_nats(nats.url, arrivals))
        case "rabbitmq":
            rabbitmq = RabbitMQServer(folder)
            sink = _toml(type="rabbitmq", url=rabbitmq.url, exchange=TARGET)
            return Broker("RabbitMQ", rabbitmq, sink, lambda arrivals: audit.on_rabbitmq(rabbitmq.url, arrivals))
        case "pubsub":
            require("google.pubsub_v1", "pubsub")
            emulator = PubSubEmulator(folder)
            # An emulator that was there before us may hold the topics of an earlier demo.
            project = f"demo-{secrets.token_hex(4)}"
            sink = _toml(type="pubsub", project=project, topic=TARGET, emulator_host=emulator.address)
            return Broker(
                "the Pub/Sub emulator",
                emulator,
                sink,
                lambda arrivals: audit.on_pubsub(emulator.address, project, arrivals),
            )
        case _:
            raise ValueError(f"there is no broker {kind!r}")


def require(module: str, extra: str) -> None:
    """Raises MissingProgramError unless a Python module is installed."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise MissingProgramError(
            f"the package {module.partition('.')[0]} is not installed: pip install 'pgbridge[{extra}]'"
        )


def _toml(**settings: str) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
