"""`pgbridge check` as a command: its lines, what it prints, and what docs/check.md says of them."""

import json
import re

from tests.support.checked import HANDLER, PAGE, World, first_lines, found_in, printed, wrong_of

SUBJECTS = [
    "routes",
    "postgres",
    "listen",
    "clock",
    "schema",
    "privileges",
    "durability",
    "positions",
    "log",
    "transactions",
    "connections",
    "sink events",
    "topology",
    "worker invoices",
]


async def test_where_nothing_is_broken_every_line_is_ok(shop_world: World) -> None:
    found = await found_in(shop_world.settings())
    assert wrong_of(found) == []
    assert [finding.subject for finding in found] == SUBJECTS


def test_the_page_lists_every_subject() -> None:
    page = PAGE.read_text()
    listed = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    # Other tests compare these with what is said.
    wrong = re.findall(r"^\| .* \| `(?:warn|FAIL)` \*\*([^*]+)\*\*", page, flags=re.MULTILINE)
    kinds = {re.sub(r"^(channel|sink|worker) .*", r"\1 <name>", each) for each in ["settings", *SUBJECTS, *wrong]}
    assert set(listed) == kinds


async def test_lines_fit_80_columns_and_commands_stay_whole(shop_world: World) -> None:
    one_port = {
        "[[routes]]": '[observe]\nlisten = "0.0.0.0:9187"\n[[routes]]',
        HANDLER: f'{HANDLER}\nlisten = "127.0.0.1:9187"',
    }
    path = shop_world.settings(change={"shop.rendered": "shop.gone", **one_port})
    shop_world.admin("revoke execute on function bridge.prune from bridge_relay")
    try:
        out = await printed("--config", str(path), expect=78)
        told = [json.loads(line) for line in (await printed("--json", "--config", str(path), expect=78)).splitlines()]
    finally:
        shop_world.admin("grant execute on function bridge.prune to bridge_relay")
    assert "FAIL  ports              observe.listen and workers.invoices.listen are both" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "grant bridge_relay to shop_bridge\n" in out
    assert ["settings", *(each["subject"] for each in told)] == [line[6:25].strip() for line in first_lines(out)]
    [ports] = [each for each in told if each["subject"] == "ports"]
    assert not ports["ok"]
    assert ports["text"] in " ".join(out.split())
