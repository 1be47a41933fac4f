"""What charts are made of: rates, levels and durations from the samples, and gaps where there are none."""

from collections.abc import AsyncIterator

import pytest

from bridge.postgres.connection import connect
from bridge.postgres.history import DAY, HOUR, MONTH, History, Span, read_history
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings
from tests.support.messages import execute
from workers.inbox import Inbox
from workers.metrics import ATTEMPT_SECONDS, DELIVERIES, IN_HAND
from workers.sampling import Sampling

STORED = """
insert into bridge.sample (step, kind, bridge, name, at, seconds, counts, levels)
select %s, %s, %s, %s, to_timestamp((floor(extract(epoch from clock_timestamp()) / %s) - %s) * %s), %s, %s, %s
"""


@pytest.fixture
async def connection(bridge_database: str) -> AsyncIterator[Connection]:
    async with await connect(PostgresSettings.model_validate({"dsn": bridge_database}), "test") as connection:
        yield connection


async def stored(
    dsn: str, ago: int, counts: str = "{}", levels: str = "{}", *, step: int = 15, seconds: float = 15.0,
    kind: str = "sink", bridge: str = "shop", name: str = "events",
) -> None:  # fmt: skip
    """A sample of so many steps ago; 1 is the last that is over."""
    await execute(dsn, STORED, step, kind, bridge, name, step, ago, step, seconds, counts, levels)


async def of_events(connection: Connection, span: Span = HOUR) -> History:
    return (await read_history(connection, "sink", "shop", ["events"], span))["events"]


async def test_a_rate_is_that_of_the_time_in_which_somebody_counted(
    bridge_database: str, connection: Connection
) -> None:
    # Another process took the lead within the step before the last, and what the first counted at its end is not known.
    await stored(bridge_database, 3, '{"published": 150}')
    await stored(bridge_database, 2, '{"published": 80}', seconds=8.0)
    await stored(bridge_database, 1, '{"published": 300}', seconds=30.0)
    await stored(bridge_database, 0, '{"published": 1}')  # is not over
    values = (await of_events(connection)).rate("published", "published").values
    assert values[-4:] == (None, 10.0, 10.0, 10.0)
    assert len(values) == 240
    assert set(values[:-3]) == {None}


async def test_a_moment_gives_no_rate(bridge_database: str, connection: Connection) -> None:
    await stored(bridge_database, 1, '{"published": 0}', '{"lag": 4.5}', seconds=0.01)
    history = await of_events(connection)
    assert history.rate("published", "published").values[-1] is None
    assert history.level("lag", "seconds", "lag").values[-1] == 4.5


@pytest.mark.parametrize("span", [DAY, MONTH])
async def test_over_a_day_and_a_month_a_rate_is_that_of_the_whole_step(
    bridge_database: str, connection: Connection, span: Span
) -> None:
    await stored(bridge_database, 1, '{"published": 3600}', step=span.step, seconds=span.step / 2)
    await stored(bridge_database, span.steps, '{"published": 7200}', step=span.step)
    await stored(bridge_database, span.steps + 1, '{"published": 1}', step=span.step)
    values = (await of_events(connection, span)).rate("published", "published").values
    assert (values[0], values[-1]) == (7200 / span.step, 3600 / span.step)
    assert len(values) == span.steps


async def test_two_bridges_on_one_log_have_histories_of_their_own(bridge_database: str, connection: Connection) -> None:
    await stored(bridge_database, 1, '{"published": 15}')
    await stored(bridge_database, 1, '{"published": 30}', bridge="other")
    await stored(bridge_database, 1, '{"published": 45}', name="audit")
    found = await read_history(connection, "sink", "shop", None, HOUR)
    rates = {name: history.rate("", "published").values[-1] for name, history in found.items()}
    assert rates == {"events": 1.0, "audit": 3.0}


async def test_processes_of_a_worker_are_one_whose_rate_is_the_sum(
    bridge_database: str, connection: Connection
) -> None:
    # Two that ran through, and one that began five seconds before the end.
    await stored(
        bridge_database, 1, '{"handled": 350, "retried": 20, "dead_lettered": 10, "in_hand": 45}',
        kind="worker", bridge="", name="stock", seconds=35.0,
    )  # fmt: skip
    found = await read_history(connection, "worker", "", ["stock", "nobody"], HOUR)
    stock = found["stock"]
    assert stock.rate("", "handled").values[-1] == pytest.approx(350 / 15)
    assert stock.rate("", "retried", "dead_lettered", "crashed").values[-1] == 2.0
    assert stock.mean("", "events", "in_hand").values[-1] == 3.0
    assert set(found["nobody"].rate("", "handled").values) == {None}


async def test_durations_lie_within_their_buckets(bridge_database: str, connection: Connection) -> None:
    counts = ('{"le_0.005": 0, "le_0.01": 50, "le_0.1": 49, "le_0.05": 0, "le_inf": 1, "handled": 7}', '{"handled": 1}')
    for ago, each in zip((2, 1), counts, strict=True):
        await stored(bridge_database, ago, each, kind="worker", bridge="", name="stock")
    stock = (await read_history(connection, "worker", "", ["stock"], HOUR))["stock"]
    assert stock.quantile("", 0.5).values[-2:] == (pytest.approx(0.01), None)
    assert stock.quantile("", 0.25).values[-2] == pytest.approx(0.0075)
    assert stock.quantile("", 0.99).values[-2] == pytest.approx(0.1)
    assert stock.quantile("", 1.0).values[-2] == pytest.approx(0.1), "above the last bound nothing is known"


async def test_what_a_worker_stores_is_what_its_history_reads(bridge_database: str, connection: Connection) -> None:
    """The names of counts are the same on both sides, which do not import each other."""
    inbox = Inbox("stock", PostgresSettings.model_validate({"dsn": bridge_database}), concurrency=1)
    await inbox.open()
    IN_HAND.labels("stock").set(2)
    sampling = Sampling("stock", inbox)
    for outcome in ("handled", "handled", "retried", "dead_lettered", "crashed"):
        DELIVERIES.labels("stock", outcome).inc()
        ATTEMPT_SECONDS.labels("stock").observe(0.02)
    await sampling.store()
    await inbox.close()
    await execute(bridge_database, "update bridge.sample set at = at - interval '15 s', seconds = 15 where step = 15")
    stock = (await read_history(connection, "worker", "", ["stock"], HOUR))["stock"]
    last = [value for value in stock.rate("", "handled").values if value is not None]
    assert last == [pytest.approx(2 / 15)]
    failed = [value for value in stock.rate("", "retried", "dead_lettered", "crashed").values if value is not None]
    assert failed == [pytest.approx(3 / 15)]
    [median] = [value for value in stock.quantile("", 0.5).values if value is not None]
    assert median == pytest.approx(0.0175), "the bucket is from 10 to 25 ms"
