"""Which pages there are, in the order of the menu."""

from typing import Final

from bridge.console import bridges, event, events, flow
from bridge.console.parts import Page

PAGES: Final[tuple[Page, ...]] = (flow.PAGE, events.PAGE, event.PAGE, bridges.PAGE)
