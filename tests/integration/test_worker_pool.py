"""What a worker's connections send, on a real PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.settings import PostgresSettings
from workers.pool import Pool
from workers.result import recordable

VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals()
    | st.binary()
    | st.text(st.characters(codec=None, exclude_categories=()))
)

TEXTS = st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=20)


@pytest_asyncio.fixture
async def pool(shop: PostgresSettings) -> AsyncIterator[Pool]:
    pool = Pool(shop, "pgbridge test", size=2, limit=30.0)
    await pool.open()
    yield pool
    await pool.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(TEXTS)
async def test_arrays_of_any_text_arrive_as_they_are(pool: Pool, texts: list[str | None]) -> None:
    assert await pool.value("select %s::text[]", texts) == texts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
async def test_whatever_an_effect_gave_jsonb_takes_what_is_kept_of_it(pool: Pool, value: object) -> None:
    text, _ = recordable({"value": value})
    assert await pool.value("select jsonb_typeof(%s::jsonb)", text) == "object"


async def test_arrays_of_numbers_arrive_as_they_are(pool: Pool) -> None:
    [row] = await pool.rows(
        "select %s::bigint[], %s::int[], %s::double precision[], %s::uuid[]",
        [2**63 - 1, -(2**63), None],
        [],
        [0.1, 1e-300, 3600.0, 1],
        [None],
    )
    assert row == ([2**63 - 1, -(2**63), None], [], [0.1, 1e-300, 3600.0, 1.0], [None])


async def test_statements_of_one_moment_get_their_own_rows(pool: Pool) -> None:
    """A connection keeps its cursor: whoever gets the connection next must not get rows that were another's."""
    texts = [[str(number)] * (number % 7) for number in range(200)]
    assert await asyncio.gather(*(pool.value("select %s::text[]", each) for each in texts)) == texts
