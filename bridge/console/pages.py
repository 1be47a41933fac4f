"""Which pages there are, in the order of the menu."""

from typing import Final

from bridge.console import (
    bridges,
    dead,
    dead_audit,
    dead_letter,
    dead_plan,
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
from bridge.console.parts import Page

PAGES: Final[tuple[Page, ...]] = (
    flow.PAGE,
    events.PAGE,
    event.PAGE,
    event_replay.PAGE,
    workers.PAGE,
    worker.PAGE,
    dead.PAGE,
    dead_letter.PAGE,
    dead_plan.PAGE,
    dead_audit.PAGE,
    webhooks.PAGE,
    webhook.PAGE,
    webhook_delivery.PAGE,
    bridges.PAGE,
)
