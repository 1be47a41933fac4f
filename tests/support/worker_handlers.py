"""Handlers that the worker processes of tests run."""

import asyncio
import random

from bridge.event import Event
from workers import Reject, handler
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
