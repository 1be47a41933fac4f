"""What `pgbridge check` says of workers: their handlers, options, logins and reply functions."""

from collections.abc import Mapping
from typing import Final

import pytest

from tests.support.checked import HANDLER, Broken, Section, World

BROKEN: Final[Mapping[str, Broken]] = {
    "a handler that cannot be imported": Broken(
        "topology",
        ["workers.invoices.handler: cannot import nowhere"],
        78,
        change={HANDLER: 'handler = "nowhere:render"'},
    ),
    "an option that the handler does not know": Broken(
        "worker invoices",
        ["workers.invoices.options.x: unknown key"],
        78,
        change={HANDLER: f"{HANDLER}\noptions = {{x = 1}}"},
    ),
    "no reply function": Broken(
        "worker invoices",
        ["workers.invoices.reply: there is no function shop.gone(uuid, jsonb)"],
        69,
        change={"shop.rendered": "shop.gone"},
    ),
    "a reply function with other parameters": Broken(
        "worker invoices",
        ["there is no function shop.wrong(uuid, jsonb)"],
        69,
        change={"shop.rendered": "shop.wrong"},
        sql="create function shop.wrong(event_id text, result jsonb) returns void language sql as ''",
        undo="drop function shop.wrong",
    ),
    "a reply function that the workers' role may not call": Broken(
        "worker invoices",
        ["this role may not call shop.rendered", "GRANT EXECUTE ON FUNCTION"],
        69,
        sql="revoke execute on function shop.rendered from public",
        undo="grant execute on function shop.rendered to public",
    ),
    "a workers' login without its role": Broken(
        "worker invoices",
        ["workers.dsn: "],
        69,
        sql="revoke bridge_worker from shop_workers",
        undo="grant bridge_worker to shop_workers",
    ),
    "no server for the workers": Broken(
        "worker invoices",
        ["workers.dsn: PostgreSQL at 127.0.0.1:1 does not answer"],
        69,
        change={'[workers]\ndsn = "': '[workers]\ndsn = "postgresql://shop_workers@127.0.0.1:1/shop" # "'},
    ),
}

SECTION: Final = Section("Workers", BROKEN)


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_broken_is_named(shop_world: World, broken: str) -> None:
    await SECTION.breaks(shop_world, broken)


def test_the_page_shows_what_is_said() -> None:
    SECTION.compare_with_page()
