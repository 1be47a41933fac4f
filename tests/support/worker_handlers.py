"""Handlers that the worker processes of tests run."""

import asyncio
import json
import logging
import random
from pathlib import Path

import structlog
from opentelemetry import trace

from bridge.event import Event
from workers import Options, Reject, handler
from workers.handler import Result


@handler("shop.order.placed")
async def echo(event: Event) -> Result:
    """Takes long enough to be killed in the middle."""
    await asyncio.sleep(0.005)
    return {"of": event.json()}


@handler("refuse.*")
async def refuse(event: Event) -> Result:
    """Takes nothing."""
    raise Reject("no")


@handler("shop.order.placed")
async def stumble(event: Event) -> Result:
    """Fails at random, one time in five."""
    await asyncio.sleep(0.002)
    if random.random() < 0.2:
        raise ValueError("not this time")
    return {"of": event.json()}


class BookOptions(Options):
    refused: Path
    """A file: a list of the payloads that are rejected, as long as they stand there."""


@handler("shop.order.placed", options=BookOptions)
async def book(event: Event, options: BookOptions) -> Result:
    """Rejects what its file names, so that a test can mend the cause."""
    await asyncio.sleep(0.002)
    if event.json() in json.loads(options.refused.read_text()):
        raise Reject("there is no such account")
    return {"of": event.json()}


@handler("shop.invoice.requested")
async def typeset(event: Event) -> Result:
    """Records a span of its own, and logs a line."""
    with trace.get_tracer("shop").start_as_current_span("typeset"):
        structlog.get_logger().info("shop.typeset")
    return {"of": event.json()}


@handler("shop.invoice.rendered")
def mail(event: Event) -> Result:
    """Runs in a thread, and logs a line by way of the standard library."""
    logging.getLogger("shop").warning("mailed")
    return None
