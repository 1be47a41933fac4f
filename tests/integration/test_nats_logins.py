"""Who we are to NATS by a signature: NKeys and credentials files, taken and refused, by everything that connects."""

from pathlib import Path

import nkeys
import pytest

from bridge.brokers.nats.settings import NatsSettings
from bridge.errors import LoginError, SettingsError
from bridge.settings import load
from tests.support.nats_accounts import Accounts, Key
from tests.support.refusals import SINK, all_are_refused, everything_that_connects
from tests.support.servers import NatsServer

SETTINGS = """
name = "test"
[sinks.mine]
type = "nats"
url = "{url}"
{line}
"""


def nats(folder: Path, line: str, url: str = "nats://127.0.0.1:4222") -> NatsSettings:
    path = folder / "bridge.toml"
    path.write_text(SETTINGS.format(url=url, line=line))
    settings = load(path, {}).sinks[SINK]
    assert isinstance(settings, NatsSettings)
    return settings


async def everything_connects(settings: NatsSettings) -> None:
    """What declares comes first, since what opens asks for what is there."""
    uses = everything_that_connects(settings, apply=True)
    for name in sorted(uses, key=lambda name: "topology" not in name):
        await uses[name]()


async def all_say(settings: NatsSettings, field: str, *words: str) -> None:
    uses = everything_that_connects(settings)
    await all_are_refused(uses, LoginError, str(settings.servers), *words, key=field, limit=4.0)


async def test_an_nkey_lets_in_whose_public_half_the_server_knows(tmp_path: Path) -> None:
    ours, other = Key(nkeys.PREFIX_BYTE_USER), Key(nkeys.PREFIX_BYTE_USER)
    (tmp_path / "seed").write_text(f"{ours.seed}\n")
    lines = [f"authorization {{ users: [{{ nkey: {ours.public} }}] }}"]
    with NatsServer(tmp_path / "server", lines=lines) as server:
        await everything_connects(nats(tmp_path, f'nkey_file = "{tmp_path / "seed"}"', server.url))
        await all_say(nats(tmp_path, f'nkey = "{other.seed}"', server.url), "nkey", "refuses the NKey")


async def test_credentials_let_in_whom_a_known_account_has_signed(tmp_path: Path) -> None:
    accounts = Accounts()
    with NatsServer(tmp_path / "server", lines=accounts.lines) as server:
        mine = tmp_path / "bridge.creds"
        mine.write_text(accounts.credentials())
        await everything_connects(nats(tmp_path, f'credentials_file = "{mine}"', server.url))
        for refused in (
            accounts.credentials(signed_by=Key(nkeys.PREFIX_BYTE_ACCOUNT)),
            accounts.credentials(expires=-60),
        ):
            mine.write_text(refused)
            settings = nats(tmp_path, f'credentials_file = "{mine}"', server.url)
            await all_say(settings, "credentials", "refuses the JWT")


async def test_without_a_login_the_server_that_wants_one_refuses(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "server", lines=Accounts().lines) as server:
        await all_say(nats(tmp_path, "", server.url), "url", "refuses the user, the password or the token")


SEED = Key(nkeys.PREFIX_BYTE_USER).seed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('nkey = "hunter2"', "nkey: holds no NKey seed of a user"),
        ('nkey = "{account}"', "nkey: holds no NKey seed of a user"),
        ('credentials = "hunter2"', "credentials: holds no JWT of a user; name the file that"),
        ('nkey_file = "/nowhere/hunter2.seed"', "nkey_file: the secret file '/nowhere/"),
        ('nkey = "{seed}"\ncredentials_file = "{credentials}"', "nkey: is given beside credentials"),
    ],
)
def test_a_login_that_cannot_be_one_is_told_when_settings_load(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "creds").write_text(Accounts().credentials())
    account = Key(nkeys.PREFIX_BYTE_ACCOUNT).seed
    with pytest.raises(SettingsError) as caught:
        nats(tmp_path, line.format(seed=SEED, account=account, credentials=tmp_path / "creds"))
    assert f"sinks.mine.{says}" in str(caught.value)
    for secret in (SEED, account):
        assert secret not in str(caught.value)


def test_a_login_stands_in_one_place(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nkey: is given beside a user in the url"):
        nats(tmp_path, f'nkey = "{SEED}"', "nats://u:hunter2@h")


def test_no_seed_is_shown(tmp_path: Path) -> None:
    settings = nats(tmp_path, f'nkey = "{SEED}"')
    assert SEED not in repr(settings) + repr(settings.signed_login) + settings.model_dump_json()
