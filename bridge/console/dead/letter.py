"""The page of one dead letter: why it was given up, and what it carries."""

from typing import Any, Final

from starlette.requests import Request

from bridge.brokers.contract import Letter
from bridge.commands.dead_groups import group_id, place_of
from bridge.commands.dead_letters import selected_ids
from bridge.commands.dead_outbox import OUTBOX
from bridge.console.parts import Page, Parts
from bridge.console.payload import indented
from bridge.errors import UsageError


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    (id_,) = selected_ids([request.query_params.get("id", "")])
    found = await parts.dead.find(id_)
    box = id_.partition(":")[0]
    if box != OUTBOX and box not in parts.settings.workers:
        raise UsageError(f"there is no worker {box!r} in the settings, so none of its dead letters can be found")
    letter = found.letter
    return {
        "id": id_,
        "found": found,
        "letter": letter,
        "group": None if letter is None else group_id(letter),
        "place": None if letter is None else place_of(letter),
        "payload": "" if letter is None else _payload(letter, is_whole=found.is_whole),
    }


def _payload(letter: Letter, *, is_whole: bool) -> str:
    text = (letter.payload or b"").decode(errors="replace")
    is_json = is_whole and "json" in (letter.content_type or "")
    return (indented(text) if is_json else None) or text


PAGE: Final = Page("dead_letter", "/dead/letter", "Dead letter", _show, in_menu=False)
