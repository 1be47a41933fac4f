"""AMQP frames as they are on the wire."""

from bridge.brokers.rabbitmq.frames import Frames


def together(frames: Frames) -> bytes:
    """In one piece."""
    return frames if isinstance(frames, bytes) else b"".join(frames)
