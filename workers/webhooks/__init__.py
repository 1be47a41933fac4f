"""Webhooks that are sent to the endpoints of other people, as the Standard Webhooks specification has them.

The way of one event, continued from `workers`:

1. `fan_out` is the handler of a worker whose reply is ``bridge.webhook_fan_out``. It makes the message of an event;
   the reply stores it, with a delivery for each endpoint that wants the topic, in one transaction with the inbox: once.
2. ``sender.py`` is another process, ``pgbridge-worker deliver``. It claims deliveries that are due, signs
   (``signature.py``), posts (``client.py``), and records what came. ``deliveries.py`` asks the database for that, and
   ``0018_webhooks.sql`` decides what is sent when.

    [workers.hooks]
    handler = "workers.webhooks:fan_out"
    subscribe = ["shop.#"]
    reply = "bridge.webhook_fan_out"
    effects = false

Apart, since the second speaks to strangers' servers: it can be kept from the inside network, and when it is down,
events are stored all the same. ``commands.py`` starts it, and ``endpoints.py`` is what people do with endpoints and
deliveries.
"""

import json
from datetime import UTC
from typing import NoReturn

from bridge.event import Event
from workers.handler import Reject, Result, handler
from workers.result import storable
from workers.webhooks.options import WebhookOptions

__all__ = ["WebhookOptions", "fan_out", "message_body"]


@handler(options=WebhookOptions, needs_reply=True)
async def fan_out(event: Event, options: WebhookOptions) -> Result:
    """The message that goes to every endpoint which wants the event. Its id is the event's `inbox_id`."""
    return {
        "topic": storable(event.topic),
        "key": None if event.key is None else storable(event.key),
        "time": event.time.isoformat(),
        "body": message_body(event),
    }


def message_body(event: Event) -> str:
    """``{"type": <topic>, "timestamp": <time>, "data": <payload>}``.

    A payload of JSON stands in it as it was written, so that no number loses a digit; any other text is a string.
    Raises Reject for what is neither.
    """
    try:
        text = event.payload.decode()
    except UnicodeDecodeError as error:
        raise Reject(
            f"payload: is neither JSON nor text ({event.content_type}), and cannot be in a webhook: {error}"
        ) from None
    if _is_json(event.content_type):
        _require_json(text)
    else:
        text = json.dumps(text, ensure_ascii=False)
    topic = json.dumps(event.topic, ensure_ascii=False)
    time = event.time.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return f'{{"type":{topic},"timestamp":"{time}","data":{text}}}'


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def _require_json(text: str) -> None:
    """Raises Reject. Numbers are not converted, which Python refuses for those of very many digits."""
    try:
        json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Reject(f"payload: is not JSON, and would break the webhook's: {error}") from None


def _refuse(constant: str) -> NoReturn:
    """Python's reader would take them."""
    raise ValueError(f"it has no {constant}")
