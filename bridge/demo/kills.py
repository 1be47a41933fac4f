"""Crashes on purpose: SIGKILL for bridge, worker and database, at random moments while orders come in."""

import asyncio
import random
from collections.abc import Callable

from bridge.demo.orders import Till
from bridge.demo.world import World

FIRST, LAST = 0.1, 0.9
"""The part of the orders between which the kills lie."""
ORDERS_A_ROUND = 500
"""Each such number of orders, begun or full, brings one more kill of each."""


class Kills:
    """Every victim is killed once a round; `happened` names them in order."""

    def __init__(self, world: World, till: Till) -> None:
        self.happened: list[str] = []
        self._world = world
        self._till = till

    async def run(self) -> None:
        """Returns after the last kill, when the database is back; bridge and worker are brought back by others."""
        victims = list(self._victims() * -(-self._till.orders // ORDERS_A_ROUND))
        choose = random.SystemRandom()
        choose.shuffle(victims)
        for number, (name, strike) in enumerate(victims):
            moment = FIRST + (LAST - FIRST) * (number + choose.random()) / len(victims)
            while self._till.placed < moment * self._till.orders:  # noqa: ASYNC110 - the till does not signal
                await asyncio.sleep(0.01)
            self.happened.append(name)
            await asyncio.to_thread(strike)

    def _victims(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        world = self._world

        def crash_database() -> None:
            world.postgres.kill()
            world.postgres.start()

        return ("bridge", world.bridge.kill), ("worker", world.worker.kill), ("database", crash_database)
