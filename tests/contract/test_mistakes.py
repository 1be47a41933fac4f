"""One mistake has one answer on every broker, for sink, queue, topology and dead letters alike.

The answer is an error of one class, which ends a command with 69, since what is wrong may be put right elsewhere; it
names the key of the setting that leads there, and holds no secret.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bridge.errors import BrokerUnavailableError, LoginError, PgbridgeError, PrivilegeError, RefusedError
from tests.contract.mistakes import BROKERS, Mistake, Place
from tests.support.refusals import all_are_refused, everything_that_connects

ANSWERS: dict[str, type[PgbridgeError]] = {
    "server down": BrokerUnavailableError,
    "wrong password": LoginError,
    "missing place": RefusedError,
    "no permission": PrivilegeError,
    "certificate not trusted": RefusedError,
}
"""By mistake. The missing place is a virtual host, an account with JetStream, a project."""


@pytest.fixture(params=sorted(BROKERS))
async def place(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> AsyncIterator[tuple[str, Place]]:
    fixture, _ = BROKERS[request.param]
    server = request.getfixturevalue(fixture) if fixture else None
    async with AsyncExitStack() as stack:
        yield request.param, Place(stack, server, unique, tmp_path)


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_mistake_ends_the_same_way_for_everything_that_connects(name: str, place: tuple[str, Place]) -> None:
    broker, at = place
    mistake: Mistake = await BROKERS[broker][1](name, at)
    uses = everything_that_connects(mistake.settings, at.name, apply=True)
    for use in mistake.met_late_by:
        del uses[use]
    await all_are_refused(uses, ANSWERS[name], key=mistake.key, exactly=False)
    assert ANSWERS[name].exit_code == 69


@pytest.mark.parametrize("name", ANSWERS)
async def test_only_where_nothing_answers_is_it_said_so(name: str, place: tuple[str, Place]) -> None:
    broker, at = place
    mistake: Mistake = await BROKERS[broker][1](name, at)
    with pytest.raises(PgbridgeError) as caught:
        await everything_that_connects(mistake.settings, at.name, apply=True)["sink's topology"]()
    assert ("does not answer" in str(caught.value)) == (name == "server down")
