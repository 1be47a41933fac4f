"""Which pages there are, in the order of the menu."""

from typing import Final

from bridge.console import bridges, event, events, flow, webhook, webhook_delivery, webhooks, worker, workers
from bridge.console.parts import Page

PAGES: Final[tuple[Page, ...]] = (
    flow.PAGE,
    events.PAGE,
    event.PAGE,
    workers.PAGE,
    worker.PAGE,
    webhooks.PAGE,
    webhook.PAGE,
    webhook_delivery.PAGE,
    bridges.PAGE,
)
