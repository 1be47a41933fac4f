"""TLS to PostgreSQL and NATS: whom we trust, whom they trust, and what is said where it does not fit.

RabbitMQ's part is in `test_rabbitmq_refusals`.
"""

import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from bridge.brokers.nats.settings import NatsSettings
from bridge.commands.check import Finding, findings
from bridge.errors import LoginError, PgbridgeError, RefusedError, SettingsError
from bridge.postgres.connection import connect, connect_blocking
from bridge.settings import PostgresSettings, load
from tests.support.certificates import Authority
from tests.support.commands import command
from tests.support.environment import ROOT
from tests.support.refusals import SINK, all_are_refused, everything_that_connects
from tests.support.servers import NOT_DURABLE, MissingProgramError, NatsServer
from tests.support.strict_postgres import TlsPostgresServer


@dataclass(frozen=True)
class Client:
    """What a client has in its folder: `mine` and `expired` of the server's authority, `other` of another one."""

    folder: Path
    ca: Path

    @classmethod
    def make(cls, folder: Path, authority: Authority) -> "Client":
        authority.issue(folder / "mine")
        authority.issue(folder / "expired", expired=True)
        Authority.make(folder / "other-ca").issue(folder / "other")
        return cls(folder, authority.file)

    def filled(self, text: str) -> str:
        return text.replace("{ca}", str(self.ca)).replace("{folder}", str(self.folder))


# PostgreSQL


@pytest.fixture(scope="module")
def server(server_folder: Path) -> Iterator[TlsPostgresServer]:
    try:
        made = TlsPostgresServer(server_folder / "tls", settings=NOT_DURABLE)
    except MissingProgramError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have every server: {error}")
        pytest.skip(str(error))
    with made:
        with psycopg.connect(made.dsn(), autocommit=True) as admin:
            admin.execute("create role certified login")
        yield made


@pytest.fixture(scope="module")
def client(server: TlsPostgresServer, server_folder: Path) -> Client:
    made = Client.make(server_folder / "client", server.authority)
    for key in made.folder.glob("*/key.pem"):
        key.chmod(0o600)  # libpq takes no other
    return made


def dsn_of(server: TlsPostgresServer, client: Client, parameters: str) -> str:
    """A later parameter wins."""
    place = f"host=db.test hostaddr=127.0.0.1 port={server.port} dbname=postgres user=postgres password=hunter2"
    return f"{place} sslmode=verify-full sslrootcert={client.ca} {client.filled(parameters)}"


OWN = "user=certified sslcert={folder}/mine/certificate.pem sslkey={folder}/mine/key.pem"


@pytest.mark.parametrize("parameters", ["", OWN])
async def test_a_server_that_is_proven_and_that_trusts_us_is_connected(
    server: TlsPostgresServer, client: Client, parameters: str
) -> None:
    settings = PostgresSettings(dsn=SecretStr(dsn_of(server, client, parameters)))
    session = await connect(settings, "test")
    async with session:
        shown = await session.execute("select ssl, client_dn is not null from pg_stat_ssl where pid = pg_backend_pid()")
        assert await shown.fetchall() == [(True, bool(parameters))]
    connect_blocking(settings, "test").close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may put another folder in the place of the machine's")
def test_authorities_of_the_system_are_found_where_this_machine_keeps_them(
    server: TlsPostgresServer, client: Client, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    shutil.copy(server.authority.file, trusted / "authority.pem")
    subprocess.run(["openssl", "rehash", str(trusted)], check=True)
    code = (
        "import sys; from bridge.settings import PostgresSettings\n"
        "from bridge.postgres.connection import connect_blocking\n"
        "connect_blocking(PostgresSettings(dsn=sys.argv[1]), 'test').close()"
    )
    in_its_place = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    place = Path(ssl.get_default_verify_paths().openssl_capath).resolve()
    dsn = dsn_of(server, client, "sslrootcert=system")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", in_its_place, "sh", trusted, place, sys.executable, "-c", code, dsn],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},  # no SSL_CERT_FILE
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Refusal:
    parameters: str
    error: type[PgbridgeError]
    says: list[str] = field(default_factory=list)


REFUSALS = {
    "another authority": Refusal(
        "sslrootcert={folder}/other-ca/certificate.pem",
        RefusedError,
        ["shows a certificate that is not trusted", "sslrootcert=FILE"],
    ),
    "another host": Refusal(
        "host=127.0.0.1", RefusedError, ["shows the certificate of another host", "Put the name that the certificate"]
    ),
    "no certificate of ours": Refusal(
        "user=certified", LoginError, ["asks for a certificate of the client", "sslcert=FILE sslkey=FILE"]
    ),
    "ours of another authority": Refusal(
        OWN.replace("mine", "other"), LoginError, ["does not take the certificate", "unknown ca", "sslcert=FILE"]
    ),
    "ours has expired": Refusal(
        OWN.replace("mine", "expired"), LoginError, ["does not take the certificate", "certificate expired", "in date"]
    ),
    "ours is not there": Refusal(
        "user=certified sslcert={folder}/none.pem",
        SettingsError,
        ['client certificate file "{folder}/none.pem" does not exist; correct sslcert in the DSN'],
    ),
    "the authority's is not there, and would be passed over": Refusal(
        "sslmode=require sslrootcert={folder}/none.pem", SettingsError, ['root certificate file "{folder}/none.pem"']
    ),
    "the authority's holds no certificate": Refusal(
        "sslrootcert={folder}/mine/key.pem", SettingsError, ["could not read root certificate file"]
    ),
    "a key of another certificate": Refusal(
        "sslcert={folder}/mine/certificate.pem sslkey={folder}/other/key.pem",
        SettingsError,
        ["could not load private key file", "key values mismatch"],
    ),
}


async def is_refused(settings: PostgresSettings, kind: type[PgbridgeError], *words: str) -> None:
    """By commands and daemons alike."""
    said = []
    with pytest.raises(kind) as caught:
        await connect(settings, "test")
    said.append(caught)
    with pytest.raises(kind) as caught:
        connect_blocking(settings, "test")
    said.append(caught)
    for each in said:
        assert type(each.value) is kind
        assert str(each.value).startswith("postgres.dsn: ")
        assert "hunter2" not in str(each.value)
        for word in words:
            assert word in str(each.value)


@pytest.mark.parametrize("name", REFUSALS)
async def test_postgresql_that_is_not_proven_or_refuses_us_says_what_to_mend(
    server: TlsPostgresServer, client: Client, name: str
) -> None:
    refusal = REFUSALS[name]
    settings = PostgresSettings(dsn=SecretStr(dsn_of(server, client, refusal.parameters)))
    await is_refused(settings, refusal.error, *map(client.filled, refusal.says))
    assert refusal.error.exit_code == (78 if refusal.error is SettingsError else 69)


async def test_postgresql_whose_certificate_has_expired_is_to_be_given_another(
    server: TlsPostgresServer, client: Client
) -> None:
    """libpq says of it what it says of one that nobody trusts."""
    settings = PostgresSettings(dsn=SecretStr(dsn_of(server, client, "")))
    server.issue(expired=True)
    server.restart()
    try:
        words = (f"PostgreSQL at db.test:{server.port} ", "out of date: certificate has expired", "Renew it on the")
        await is_refused(settings, RefusedError, *words)
    finally:
        server.issue()
        server.restart()


CHECKED = """
name = "test"
[postgres]
dsn = "{dsn}"
[channels]
listen = ["news"]
buffer = "memory"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
{more}
"""


async def warnings_of(folder: Path, dsn: str, more: str = "") -> list[str]:
    path = folder / "bridge.toml"
    path.write_text(CHECKED.format(dsn=dsn, more=more))
    found: list[Finding] = [finding async for finding in findings(load(path, {}))]
    assert all(finding.ok for finding in found)
    return [finding.text for finding in found if finding.warning and finding.subject == "tls"]


@pytest.mark.parametrize(
    ("parameters", "mode"),
    [
        ("", None),
        ("sslmode=verify-ca", "verify-ca"),
        ("sslmode=require", "require"),
        ("sslmode=prefer", "prefer"),
        ("sslmode=disable", "disable"),
        ("sslmode=disable host=localhost", None),
        ("sslmode=disable host=127.0.0.1", None),
    ],
)
async def test_check_warns_of_a_server_elsewhere_that_is_not_proven(
    server: TlsPostgresServer, client: Client, tmp_path: Path, parameters: str, mode: str | None
) -> None:
    warnings = await warnings_of(tmp_path, dsn_of(server, client, parameters))
    if mode is None:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith(f"postgres.dsn: sslmode={mode} does not prove that the server is db.test: ")
    assert "Write sslmode=verify-full sslrootcert=FILE" in warning
    assert "hunter2" not in warning


async def test_check_warns_of_the_workers_server_and_still_ends_well(
    server: TlsPostgresServer, client: Client, tmp_path: Path
) -> None:
    workers = f'[workers]\ndsn = "{dsn_of(server, client, "sslmode=require")}"'
    (warning,) = await warnings_of(tmp_path, dsn_of(server, client, ""), workers)
    assert warning.startswith("workers.dsn: sslmode=require does not prove ")
    out, _ = await command("check", "--config", str(tmp_path / "bridge.toml"))
    assert "\nwarn  tls " in out
    out, _ = await command("check", "--json", "--config", str(tmp_path / "bridge.toml"))
    assert '"warning": true' in out


# NATS


@contextmanager
def nats(folder: Path, authority: Authority, *lines: str, **shown: Any) -> Iterator[NatsServer]:
    """With a certificate of the authority; `lines` are added to its block of TLS."""
    certificate, key = authority.issue(folder / "server", **shown)
    own = (f'cert_file: "{certificate}"', f'key_file: "{key}"', f'ca_file: "{authority.file}"', *lines)
    with NatsServer(folder, lines=["tls { " + "\n".join(own) + " }"]) as started:
        yield started


def nats_settings(server: NatsServer, tls: dict[str, str]) -> NatsSettings:
    values = {"type": "nats", "url": f"tls://u:hunter2@127.0.0.1:{server.port}", "tls": tls}
    return NatsSettings.model_validate(values, context={"sink": SINK})


def certificate_of(client: Client, name: str) -> dict[str, str]:
    folder = client.folder / name
    return {"ca_file": str(client.ca), "cert_file": f"{folder}/certificate.pem", "key_file": f"{folder}/key.pem"}


@pytest.fixture
def nats_authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "authority")


async def test_nats_that_is_proven_and_that_trusts_us_is_connected(tmp_path: Path, nats_authority: Authority) -> None:
    client = Client.make(tmp_path / "client", nats_authority)
    for lines, tls in (([], {"ca_file": str(client.ca)}), (["verify: true"], certificate_of(client, "mine"))):
        with nats(tmp_path, nats_authority, *lines) as server:
            settings = nats_settings(server, tls)
            uses = everything_that_connects(settings, apply=True)
            for use in ("sink's topology", "queue's topology", "sink", "queue", "dead letters"):
                await uses[use]()


@pytest.mark.parametrize(
    ("shown", "ca", "key", "words"),
    [
        ({}, "{folder}/other-ca/certificate.pem", "tls.ca_file", ["not trusted", "Name the file of the authority"]),
        ({"name": "DNS:mq.test"}, "{ca}", "url", ["not for this host", "Write the host as the certificate names it"]),
        ({"expired": True}, "{ca}", "url", ["out of date: certificate has expired", "Renew it on the server"]),
    ],
    ids=["another authority", "another host", "expired"],
)
async def test_nats_that_is_not_proven_says_what_to_mend(
    tmp_path: Path, nats_authority: Authority, shown: dict[str, Any], ca: str, key: str, words: list[str]
) -> None:
    client = Client.make(tmp_path / "client", nats_authority)
    with nats(tmp_path, nats_authority, **shown) as server:
        uses = everything_that_connects(nats_settings(server, {"ca_file": client.filled(ca)}), apply=True)
        await all_are_refused(uses, RefusedError, f"127.0.0.1:{server.port}", *words, key=key)


@pytest.mark.parametrize("name", [None, "other", "expired"])
async def test_nats_that_refuses_our_certificate_or_wants_one_says_what_to_mend(
    tmp_path: Path, nats_authority: Authority, name: str | None
) -> None:
    client = Client.make(tmp_path / "client", nats_authority)
    with nats(tmp_path, nats_authority, "verify: true") as server:
        tls = {"ca_file": str(client.ca)} if name is None else certificate_of(client, name)
        uses = everything_that_connects(nats_settings(server, tls), apply=True)
        words = ("does not take our certificate, or wants one", "Name one that is in date")
        await all_are_refused(uses, LoginError, *words, key="tls.cert_file")
