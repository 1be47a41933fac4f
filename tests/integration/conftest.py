"""What several tests share: a queue that takes everything, a database whose shop takes results, and a browser."""

import os
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from bridge.settings import PostgresSettings
from tests.support.chromium import AXE, BROWSER, DRIVER, Chromium
from tests.support.messages import Messages
from tests.support.pubsub import PROJECT
from tests.support.servers import RabbitMQServer
from tests.support.shop import SHOP, Replies


@pytest.fixture
def shop(bridge_database: str, unique: str) -> Iterator[PostgresSettings]:
    """A database with a reply function, and the settings of a login that is a bridge_worker and nothing more."""
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(SHOP)
        role = sql.Identifier(unique)
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN IN ROLE bridge_worker").format(role))
    yield PostgresSettings(dsn=SecretStr(make_conninfo(bridge_database, user=unique)), connect_timeout=5.0)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP ROLE {}").format(role))


@pytest.fixture
async def messages(rabbitmq: RabbitMQServer, unique: str) -> AsyncIterator[Messages]:
    messages = Messages(rabbitmq.url, unique)
    await messages.open()
    yield messages
    await messages.connection.close()


@pytest.fixture(params=["rabbitmq", "nats_server", "pubsub_emulator"])
def place(request: pytest.FixtureRequest, unique: str) -> tuple[str, str]:
    """The table of the sink, and what the worker needs there."""
    server = request.getfixturevalue(request.param)
    match request.param:
        case "rabbitmq":
            return (f'[sinks.e]\ntype = "rabbitmq"\nurl = "{server.url}"\nexchange = "{unique}"', "lanes = 4")
        case "nats_server":
            return (f'[sinks.e]\ntype = "nats"\nurl = "{server.url}"\nstream = "{unique}"', "")
    table = f'[sinks.e]\ntype = "pubsub"\nproject = "{PROJECT}"\ntopic = "{unique}"\nemulator_host = "{server.address}"'
    return (table, "")


@pytest.fixture
def replies(bridge_database: str) -> Iterator[Replies]:
    found = Replies(bridge_database)
    yield found
    found.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    missing = [str(path) for path in (BROWSER, DRIVER, AXE) if not path.exists()]
    if missing:
        reason = f"deploy/install-test-servers installs {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have it: {reason}")
        pytest.skip(reason)
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    """Nobody is logged in, at 1280 pixels; what the browser complains of is a failure."""
    chromium.forget()
    chromium.look_like(1280)
    chromium.complaints()
    yield chromium
    chromium.go("about:blank")
    assert [line for line in chromium.complaints() if "favicon" not in line] == []
