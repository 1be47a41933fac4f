"""Handlers that the worker processes of tests run."""

import asyncio

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
