"""What several tests share: a queue that takes everything, and a database whose shop takes the workers' results."""

from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from bridge.settings import PostgresSettings
from tests.support.messages import Messages
from tests.support.servers import RabbitMQServer
from tests.support.shop import SHOP


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
