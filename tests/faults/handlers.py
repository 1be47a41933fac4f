"""The workers of the fault suite: `count` in its event loop, `book` the same in order, `ponder` in threads.

What they do is the event's fate."""

import asyncio
import os
import time
from pathlib import Path
from typing import Final

from tests.faults.fates import FATES, TIMEOUT, Fate
from workers import Effect, Event, Options, Reject, Retry, effect, handler
from workers.handler import Result

_LINGER: Final = TIMEOUT + 0.3
_AFTER: Final = 0.7
"""Seconds that an event asks for; no rung of the worker's ladder."""
FORGOTTEN: Final = "forgotten"
"""Noted in place of a key where the inbox does not know an effect that had ended."""


class Place(Options):
    """Who this is, and where it notes what it does outside of the database."""

    worker: str
    """Its name."""
    notes: Path
    """A folder: the file `shipped` has a line for each time that an effect happened, `begun` a file for each event
    whose first attempt has gone wrong."""


@handler("shop.order.*", options=Place)
async def count(event: Event, place: Place) -> Result:
    """A coroutine."""
    return await _work(event, place)


@handler("shop.order.*", options=Place)
async def book(event: Event, place: Place) -> Result:
    """The same, in a worker that is ordered."""
    return await _work(event, place)


async def _work(event: Event, place: Place) -> Result:
    fate = _fate_of(event)
    if fate.ships:
        async with effect("ship") as shipment:
            _ship(event, place, fate, shipment)
    goes_wrong = not fate.once or _is_first(event, place)
    if fate.lingers and goes_wrong:
        await asyncio.sleep(_LINGER)
    return _end(event, place, fate, goes_wrong=goes_wrong)


@handler("shop.order.*", options=Place)
def ponder(event: Event, place: Place) -> Result:
    """The same in a thread, which no time-out can end."""
    fate = _fate_of(event)
    if fate.ships:
        with effect("ship") as shipment:
            _ship(event, place, fate, shipment)
    goes_wrong = not fate.once or _is_first(event, place)
    if fate.lingers and goes_wrong:
        time.sleep(_LINGER)
    return _end(event, place, fate, goes_wrong=goes_wrong)


def _fate_of(event: Event) -> Fate:
    return FATES[event.json()["fate"]]


def _ship(event: Event, place: Place, fate: Fate, shipment: Effect) -> None:
    if shipment.result is not None:
        return
    known = fate.once and not fate.breaks and _mark(event, place).exists()
    _note(place, event, FORGOTTEN if known else shipment.idempotency_key)
    if fate.breaks and _is_first(event, place):
        raise RuntimeError("it breaks within its effect")
    shipment.result = {"key": shipment.idempotency_key}


def _end(event: Event, place: Place, fate: Fate, *, goes_wrong: bool) -> Result:
    if goes_wrong:
        match fate.name:
            case "fails" | "fails once":
                raise RuntimeError("it fails")
            case "asks" | "asks once":
                raise Retry("it asks for another attempt", after=_AFTER)
            case "rejected":
                raise Reject("it is rejected")
    return {"by": place.worker}


def _note(place: Place, event: Event, key: str) -> None:
    # One write to a file that is only appended to is whole, and in one piece, whoever else writes.
    file = os.open(place.notes / "shipped", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{place.worker} {event.id} {key}\n".encode())
    finally:
        os.close(file)


def _is_first(event: Event, place: Place) -> bool:
    """Whether it is the first time that this is asked for the event, by whatever process."""
    try:
        _mark(event, place).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _mark(event: Event, place: Place) -> Path:
    return place.notes / "begun" / f"{place.worker}:{event.id}"
