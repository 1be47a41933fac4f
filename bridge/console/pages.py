"""Which pages there are, in the order of the menu."""

from typing import Final

from bridge.console import (
    bridges,
    event,
    event_replay,
    events,
    flow,
    webhook,
    webhook_delivery,
    webhooks,
    worker,
    workers,
)
from bridge.console.dead import audit, letter, listing, plan
from bridge.console.parts import Page

PAGES: Final[tuple[Page, ...]] = (
    flow.PAGE,
    events.PAGE,
    event.PAGE,
    event_replay.PAGE,
    workers.PAGE,
    worker.PAGE,
    listing.PAGE,
    letter.PAGE,
    plan.PAGE,
    audit.PAGE,
    webhooks.PAGE,
    webhook.PAGE,
    webhook_delivery.PAGE,
    bridges.PAGE,
)
