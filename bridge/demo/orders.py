"""The shop's checkout: places orders by SQL, as a login that may do nothing else, and is open through outages."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from bridge.demo.world import World
from bridge.postgres.connection import database_errors

_RECONNECT_DELAY: Final = 0.1
"""Seconds between two attempts to reach the database."""
_ORDERS_A_RESTOCK: Final = 20
_MOST_LINES: Final = 4
_MOST_OF_A_PRODUCT: Final = 5

T = TypeVar("T")


class Checkout:
    """Places a number of orders at a rate, each exactly once."""

    def __init__(self, dsn: str, orders: int, rate: float) -> None:
        """`rate` is in orders a second."""
        self.placed = 0
        self.orders = orders
        self._dsn = dsn
        self._rate = rate
        self._connection: AsyncConnection[TupleRow] | None = None
        self._random = random.Random()  # noqa: S311 - chooses tea, not keys

    async def run(self) -> None:
        """Places all orders. Raises PgbridgeError when the shop refuses one for another reason than an empty shelf."""
        with database_errors():
            await self._run()

    async def _run(self) -> None:
        try:
            customers, products = await self._through_outages(_catalogue)
            start = time.monotonic()
            for number in range(self.orders):
                await asyncio.sleep(start + number / self._rate - time.monotonic())
                # The same reference at every try: after a lost connection nobody knows whether it was committed.
                order = (uuid.uuid4(), self._random.choice(customers), json.dumps(self._items(products)))
                await self._through_outages(lambda connection, order=order: _place(connection, order))  # type: ignore[misc]
                self.placed += 1
                if self.placed % _ORDERS_A_RESTOCK == 0:
                    await self._through_outages(_restock)
        finally:
            if self._connection is not None:
                await self._connection.close()

    def _items(self, products: list[str]) -> list[dict[str, Any]]:
        chosen = self._random.sample(products, self._random.randint(1, min(_MOST_LINES, len(products))))
        return [{"sku": sku, "quantity": self._random.randint(1, _MOST_OF_A_PRODUCT)} for sku in chosen]

    async def _through_outages(self, work: Callable[[AsyncConnection[TupleRow]], Awaitable[T]]) -> T:
        while True:
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = await AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=5)
                return await work(self._connection)
            except psycopg.OperationalError:
                if self._connection is not None:
                    await self._connection.close()
                await asyncio.sleep(_RECONNECT_DELAY)


async def _catalogue(connection: AsyncConnection[TupleRow]) -> tuple[list[int], list[str]]:
    customers = await (await connection.execute("select id from shop.customers order by id")).fetchall()
    products = await (await connection.execute("select sku from shop.products order by sku")).fetchall()
    return [row[0] for row in customers], [row[0] for row in products]


async def _place(connection: AsyncConnection[TupleRow], order: tuple[uuid.UUID, int, str]) -> None:
    try:
        await connection.execute("select shop.place_order(%s, %s, %s)", order)
    except psycopg.errors.CheckViolation:
        # The stock does not suffice.
        await _restock(connection)
        await connection.execute("select shop.place_order(%s, %s, %s)", order)


async def _restock(connection: AsyncConnection[TupleRow]) -> None:
    await connection.execute("select shop.restock()")


FIRST, LAST = 0.1, 0.9
"""The part of the orders between which the kills lie."""
ORDERS_A_ROUND: Final = 500
"""Each such number of orders, begun or full, brings one more kill of each."""


class Kills:
    """Every victim is killed once a round; `happened` names them in order."""

    def __init__(self, world: World, checkout: Checkout) -> None:
        self.happened: list[str] = []
        self._world = world
        self._checkout = checkout

    async def run(self) -> None:
        """Returns after the last kill, when the database is back; the processes are brought back by others."""
        victims = list(self._victims() * -(-self._checkout.orders // ORDERS_A_ROUND))
        choose = random.SystemRandom()
        choose.shuffle(victims)
        for number, (name, strike) in enumerate(victims):
            moment = FIRST + (LAST - FIRST) * (number + choose.random()) / len(victims)
            while self._checkout.placed < moment * self._checkout.orders:  # noqa: ASYNC110 - the checkout does not signal
                await asyncio.sleep(0.01)
            self.happened.append(name)
            await asyncio.to_thread(strike)

    def _victims(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        world = self._world

        def crash_database() -> None:
            world.postgres.kill()
            world.postgres.start()

        killed = (world.bridge, *world.workers, world.sender)
        return *((service.name, service.kill) for service in killed), ("database", crash_database)
