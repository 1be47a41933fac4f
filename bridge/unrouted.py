"""What no route takes: it has a position of its own in the log, and becomes a dead letter, once."""

from bridge.brokers.contract import Never
from bridge.event import Event
from bridge.process.metrics import NO_ROUTE
from bridge.relay import tell_dead_letters
from bridge.sources import DeadLetter, Source

_PAGE = 2000
"""Events looked at together."""


async def bury_unrouted(source: Source) -> None:
    """Dead-letters all that a source without a sink gives, until it is cancelled. Raises what the source raises."""
    while True:
        page = await source.read(_PAGE)
        if page.events:
            letters = [no_route(event) for event in page.events]
            await source.dead_letter(letters)
            tell_dead_letters(letters)
        await source.settle(page.position, ())


def no_route(event: Event) -> DeadLetter:
    """The dead letter of an event without a route."""
    reason = f"no route takes the topic {event.topic!r}; add one to [[routes]], or set unrouted = 'drop'"
    return DeadLetter(event, None, Never(NO_ROUTE, reason), 0)
