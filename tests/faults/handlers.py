"""The worker of the fault suite."""

from bridge.event import Event
from workers import handler
from workers.handler import Result


@handler("shop.order.*")
async def count(event: Event) -> Result:
    """Its reply function writes one row an event, so a second run of the reply shows."""
    return {"of": event.json()}
