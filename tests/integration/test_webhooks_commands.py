"""`pgbridge-worker webhooks`, as a person types it."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo
from standardwebhooks import Webhook

from tests.support.webhooks import Webhooks
from workers.cli import main
from workers.webhooks.signature import sign

Command = Callable[..., Result]


@pytest.fixture
def hooks(bridge_database: str) -> Iterator[Webhooks]:
    with Webhooks(bridge_database) as opened:
        yield opened


@pytest.fixture
def command(hooks: Webhooks, bridge_database: str, unique: str, tmp_path: Path) -> Iterator[Command]:
    """Runs `pgbridge-worker webhooks ...` with the login of an operator, and nothing more."""
    role = sql.Identifier(unique)
    hooks.connection.execute(sql.SQL("create role {} login in role bridge_operator").format(role))
    config = tmp_path / "bridge.toml"
    config.write_text(f'name = "shop"\n[postgres]\ndsn = {json.dumps(make_conninfo(bridge_database, user=unique))}\n')

    def run(*arguments: object, expect: int = 0) -> Result:
        words = ["webhooks", str(arguments[0]), "--config", str(config), *map(str, arguments[1:])]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == expect, done.output + repr(done.exception)
        return done

    yield run
    hooks.connection.execute(sql.SQL("drop role {}").format(role))


def test_an_endpoint_is_added_and_its_secret_shown_once(command: Command, hooks: Webhooks) -> None:
    shown = json.loads(
        command(
            *("add", "https://example.com/x", "--topic", "shop.#", "--topic", "x.*", "--description", "theirs"),
            *("--concurrency", 2, "--rate", "30/m", "--json"),
        ).stdout
    )
    assert shown["secret"] == hooks.one("select secret from bridge.webhook_secret")
    added = hooks.endpoint(shown["endpoint"])
    assert (added.url, added.topics, added.description, added.concurrency, added.rate) == (
        *("https://example.com/x", ["shop.#", "x.*"], "theirs", 2, 0.5),
    )
    done = command("add", "https://example.com/y", "--topic", "#")
    assert "whsec_" in done.stdout
    for secret in (shown["secret"], "whsec_"):
        assert all(
            secret not in command(*words).output for words in [("list",), ("list", "--json"), ("show", 1, "--json")]
        )


def test_of_a_key_pair_only_the_public_half_is_shown(command: Command, hooks: Webhooks) -> None:
    shown = json.loads(command("add", "https://example.com/x", "--topic", "#", "--asymmetric", "--json").stdout)
    assert set(shown) == {"endpoint", "public_key"}
    assert shown["public_key"].startswith("whpk_")
    assert hooks.one("select left(secret, 5) from bridge.webhook_secret") == "whsk_"
    done = command("rotate", shown["endpoint"], expect=2)
    assert "--asymmetric" in done.stderr
    assert "whpk_" in command("rotate", shown["endpoint"], "--asymmetric", "--grace", "0s").stdout
    [secret] = [secret for (secret,) in hooks.rows("select secret from bridge.webhook_secret")]
    assert sign([secret], "m", 1, b"{}").startswith("v1a,")


def test_a_secret_that_sql_makes_signs_what_receivers_verify(command: Command, hooks: Webhooks) -> None:
    endpoint = hooks.add()
    secret = json.loads(command("rotate", endpoint, "--json").stdout)["secret"]
    now = int(time.time())
    headers = {"webhook-id": "m", "webhook-timestamp": str(now), "webhook-signature": sign([secret], "m", now, b"{}")}
    Webhook(secret).verify(b"{}", headers)
    assert hooks.one("select count(*) from bridge.webhook_secret") == 2


def test_the_list_says_how_each_endpoint_is(command: Command, hooks: Webhooks) -> None:
    assert "add one" in command("list").output
    for topic in ("ok", "gone", "down", "busy", "some"):
        hooks.add(f"{{{topic}}}", f"https://{topic}.example", concurrency=9)
        hooks.emit(6, topic)
    claims = hooks.claim()
    for topic, status, retry_after in [("ok", 200, None), ("gone", 410, None), ("down", 500, None), ("busy", 429, 600)]:
        endpoint = hooks.one("select id from bridge.webhook_endpoint where url = %s", f"https://{topic}.example")
        mine = [claim for claim in claims if claim.endpoint == endpoint]
        hooks.record(mine[: 4 if topic == "busy" else 6], status, retry_after=retry_after)
    shown = command("list").stdout.splitlines()[2:]
    lines = {first.split()[1]: second for first, second in zip(shown[::2], shown[1::2], strict=True)}
    assert lines["https://ok.example"].split() == ["ok", "ok"], "its topic, and how it is"
    assert "disabled: it answered 410 Gone" in lines["https://gone.example"]
    assert "failing, next try in" in lines["https://down.example"]
    assert "asked to wait " in lines["https://busy.example"]
    listed = {each["url"]: each for each in json.loads(command("list", "--json").stdout)}
    assert listed["https://some.example"]["sending"] == 6
    assert listed["https://down.example"]["due"] == 6
    assert listed["https://gone.example"]["failed"] == 6


def test_a_delivery_is_shown_with_its_attempts_and_no_control_character(command: Command, hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit(body='{"a":"\x1b[2J"}')
    [claim] = hooks.claim()
    hooks.record([claim], 500, answer="no\x1b[31m!\r\nnext\tline")
    shown = command("delivery", claim.delivery).stdout
    assert "\x1b[2J" not in shown
    assert "\x1b[31m" not in shown
    assert "no\\x1b[31m!\\r\nnext\tline" in shown
    assert "status 500 after 0.100 s" in shown
    made = json.loads(command("delivery", claim.delivery, "--json").stdout)["made"]
    assert [(attempt["number"], attempt["status"]) for attempt in made] == [(1, 500)]
    shown = command("show", endpoint).stdout
    assert "failing" in shown
    assert "shop.order" in shown
    deliveries: list[dict[str, Any]] = json.loads(command("show", endpoint, "--json").stdout)["deliveries"]
    assert [(each["id"], each["state"], each["last_status"]) for each in deliveries] == [(claim.delivery, "due", 500)]


def test_an_endpoint_is_disabled_enabled_recovered_and_removed(command: Command, hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=9)
    hooks.emit(3)
    command("disable", endpoint, "--why", "they moved")
    assert "already" in command("disable", endpoint).stderr
    assert hooks.states(endpoint) == {"skipped": 3}
    assert "disabled: they moved" in command("list").stdout
    command("change", endpoint, "--url", "https://new.example", "--rate", "5/s")
    command("change", endpoint, "--rate", "none", "--topic", "a.#")
    changed = hooks.endpoint(endpoint)
    assert (changed.url, changed.rate, changed.topics) == ("https://new.example", None, ["a.#"])
    command("enable", endpoint)
    assert hooks.states(endpoint) == {"skipped": 3}
    said = command("recover", endpoint, "--since", "1h", "--dry-run").stderr
    assert "3 would be due: 0 failed for good, 3 were skipped." in said
    assert hooks.states(endpoint) == {"skipped": 3}
    assert "3 are due" in command("recover", endpoint, "--since", "1h").stderr
    [claim, *_] = hooks.claim()
    hooks.record([claim])
    command("resend", claim.delivery)
    assert hooks.delivery(claim.delivery)["state"] == "due"
    command("remove", endpoint)
    assert hooks.endpoint(endpoint) is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("add", "example.com", "--topic", "#"), "It looks like https://example.com/hooks"),
        (("add", "https://me:hush@example.com", "--topic", "#"), "a user or a password"),
        (("add", "https://example.com", "--topic", "shop*"), "whole words"),
        (("add", "https://example.com"), "--topic"),
        (("add", "https://example.com", "--topic", "#", "--rate", "fast"), "is not a rate"),
        (("add", "https://example.com", "--topic", "#", "--rate", "0/s"), "is zero"),
        (("change", 1), "nothing is to be changed"),
        (("change", 1, "--rate", "5/s"), "webhooks list"),
        (("show", 1), "webhooks list"),
        (("delivery", 1), "webhooks show"),
        (("resend", 1), "webhooks show"),
        (("rotate", 1), "there is no endpoint 1"),
        (("rotate", 1, "--grace", "soon"), "is not a duration"),
        (("disable", 1), "there is no endpoint 1"),
        (("enable", 1), "there is no endpoint 1"),
        (("recover", 1, "--since", "2h"), "there is no endpoint 1"),
        (("recover", 1, "--since", "2h", "--dry-run"), "there is no endpoint 1"),
        (("recover", 1, "--since", "yesterday"), "is not a time"),
        (("remove", 1), "there is no endpoint 1"),
    ],
)
def test_words_that_cannot_be_acted_on_are_refused_with_a_way_out(
    command: Command, words: tuple[object, ...], complaint: str
) -> None:
    done = command(*words, expect=2)
    assert complaint in done.stderr
    assert "hush" not in done.output
    assert isinstance(done.exception, SystemExit)
