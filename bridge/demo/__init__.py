"""The embedded world: real servers, a shop's schema and its workers, run from one command with nothing installed.

``servers/`` starts PostgreSQL, NATS, RabbitMQ and the Pub/Sub emulator as private processes in a folder; the tests
use the same ones.
"""
