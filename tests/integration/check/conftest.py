"""A PostgreSQL server on which nothing is broken, for all tests of `pgbridge check`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.postgres.schema import migrate
from tests.support.checked import World
from tests.support.servers import PostgresServer
from tests.support.shop import SHOP


@pytest.fixture(scope="session")
def shop_world(server_folder: Path) -> Iterator[World]:
    """Without a broker: what is published is kept nowhere."""
    folder = server_folder / "check"
    folder.mkdir()
    # As other tests' servers it waits for no disk, but for the bridge's commits, whose durability is looked at.
    with PostgresServer(folder, settings={"max_connections": "60", "synchronous_commit": "off"}) as postgres:
        migrate(postgres.create_database("shop"))
        postgres.create_database("empty")
        world = World(postgres, folder)
        world.admin(SHOP)
        world.admin(
            "create role shop_bridge login in role bridge_relay; alter role shop_bridge set synchronous_commit = on; "
            "create role shop_workers login in role bridge_worker; "
            "select bridge.emit('shop.order.placed', '1'::jsonb)"
        )
        yield world
