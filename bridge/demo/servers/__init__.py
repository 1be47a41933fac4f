"""Real servers as private processes: own ports on loopback, own data folder, ended with the process that started them.

    with PostgresServer(folder) as postgres, NatsServer(folder) as nats:
        ...

Every server starts, stops, can be killed, and starts again on its port with its data. The classes block; asynchronous
code calls them through `asyncio.to_thread`.
"""

from bridge.demo.servers.nats import NatsServer
from bridge.demo.servers.postgres import PostgresServer
from bridge.demo.servers.process import MissingProgramError, Server, free_port
from bridge.demo.servers.pubsub import PubSubEmulator
from bridge.demo.servers.rabbitmq import RabbitMQServer

__all__ = [
    "MissingProgramError",
    "NatsServer",
    "PostgresServer",
    "PubSubEmulator",
    "RabbitMQServer",
    "Server",
    "free_port",
]
