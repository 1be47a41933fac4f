"""The connection of a worker's claims and ends, on a real PostgreSQL: that loses it, pauses, refuses and comes back."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable

import psycopg
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.errors import DatabaseUnavailableError, NoAnswerError, RefusedError
from bridge.settings import PostgresSettings
from tests.support.until import until
from workers import line as line_module
from workers.line import Line

TEXTS = st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=20)

MEGABYTES = 16_000_000
"""More than a socket takes at once."""


@pytest_asyncio.fixture
async def line(shop: PostgresSettings) -> AsyncIterator[Line]:
    line = Line(shop, "pgbridge test", limit=5.0)
    await line.open()
    yield line
    await line.close()


async def backend(line: Line) -> int:
    [[pid]] = await line.rows("select pg_backend_pid()")
    return int(pid or 0)


async def seen_lost(line: Line) -> None:
    connection = line._connection
    assert connection is not None
    await until(lambda: connection.closed, "the end of the session was seen")


@pytest.fixture
def end_session(bridge_database: str) -> Callable[[int], None]:
    def end(pid: int) -> None:
        with psycopg.connect(bridge_database) as admin:
            ended = admin.execute("select pg_terminate_backend(%s, 5000)", [pid]).fetchone()
        assert ended == (True,)

    return end


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(TEXTS)
async def test_arrays_of_any_text_arrive_as_they_are(line: Line, texts: list[str | None]) -> None:
    [[read]] = await line.rows("select to_json($1::text[])", texts)
    assert read is not None
    assert json.loads(read) == texts


async def test_values_of_every_kind_arrive_as_they_are(line: Line) -> None:
    [row] = await line.rows(
        "select $1::bigint, $2::double precision, $3::boolean, $4::text, $5::text, $6::bigint[], $7::float8[]",
        *(-(2**63), 0.1, True, None, "é'\"\\", [2**63 - 1, None], [1e-300, 1]),
    )
    assert row == [str(-(2**63)), "0.1", "t", None, "é'\"\\", f"{{{2**63 - 1},NULL}}", "{1e-300,1}"]


async def test_a_statement_without_rows_gives_none(line: Line) -> None:
    assert await line.rows("select 1 where $1::boolean", False) == []


async def test_statements_of_one_moment_get_their_own_rows(line: Line) -> None:
    asked = [line.rows("select $1::int from generate_series(1, $2::int)", n, n % 7) for n in range(200)]
    assert await asyncio.gather(*asked) == [[[str(n)]] * (n % 7) for n in range(200)]


async def test_more_than_a_socket_takes_arrives(line: Line) -> None:
    assert await line.rows("select length($1::text), $1::text", "x" * MEGABYTES) == [[str(MEGABYTES), "x" * MEGABYTES]]


async def test_a_refused_statement_leaves_the_session_as_it_is(line: Line) -> None:
    pid = await backend(line)
    for _ in range(2):
        with pytest.raises(psycopg.errors.DivisionByZero):
            await line.statement("select 1 / $1::int", 0)
    with pytest.raises(RefusedError, match="division by zero"):
        await line.rows("select 1 / $1::int", 0)
    with pytest.raises(psycopg.errors.SyntaxError):
        await line.statement("selectt")
    assert await line.rows("select 1 / $1::int", 1) == [["1"]]
    assert await backend(line) == pid


async def test_a_statement_that_runs_too_long_is_cancelled(shop: PostgresSettings) -> None:
    line = Line(shop, "pgbridge test", limit=0.2)
    with pytest.raises(psycopg.errors.QueryCanceled):
        await line.statement("select pg_sleep(60)")
    assert await line.rows("select 1") == [["1"]]
    await line.close()


async def test_a_session_that_ended_while_nothing_was_asked_costs_nobody_an_error(
    line: Line, end_session: Callable[[int], None]
) -> None:
    pid = await backend(line)
    end_session(pid)
    await seen_lost(line)
    assert await backend(line) != pid


async def test_a_session_that_ends_over_a_statement_is_an_outage_and_a_new_one_follows(
    line: Line, end_session: Callable[[int], None]
) -> None:
    pid = await backend(line)
    asked = asyncio.create_task(line.rows("select pg_sleep(60)"))
    await asyncio.sleep(0)
    await asyncio.to_thread(end_session, pid)
    with pytest.raises(DatabaseUnavailableError):
        await asked
    assert await backend(line) != pid


async def test_the_answer_to_one_who_gave_up_is_nobody_elses(line: Line) -> None:
    asked = asyncio.create_task(line.rows("select 'his', pg_sleep(0.2)"))
    connection = line._connection
    assert connection is not None
    await until(lambda: connection.info.transaction_status.name == "ACTIVE", "it is on its way")
    asked.cancel()
    assert await line.rows("select 'mine'") == [["mine"]]


async def test_a_server_that_does_not_answer_is_given_up_and_asked_again(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "ANSWER_GRACE", -4.5)  # so half a second of silence
    pid = await backend(line)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(NoAnswerError):
            await line.rows("select 1")
        assert await backend(line) != pid
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_who_waits_while_it_is_closed_is_told(line: Line) -> None:
    asked = asyncio.create_task(line.rows("select pg_sleep(60)"))
    connection = line._connection
    assert connection is not None
    await until(lambda: connection.info.transaction_status.name == "ACTIVE", "it is on its way")
    await line.close()
    with pytest.raises(DatabaseUnavailableError):
        async with asyncio.timeout(5):
            await asked


async def test_a_connection_that_libpq_gave_up_by_itself_is_replaced(line: Line) -> None:
    """Without a socket nothing is heard of it any more."""
    pid = await backend(line)
    connection = line._connection
    assert connection is not None
    connection.pgconn.finish()
    assert await backend(line) != pid


async def test_nothing_that_was_lost_is_watched_any_more(
    line: Line, end_session: Callable[[int], None], shop: PostgresSettings
) -> None:
    """The number of a socket that was closed is soon another's; a watch left behind would be the other's, too."""
    for _ in range(5):
        end_session(await backend(line))
        await seen_lost(line)
        others = [Line(shop, "pgbridge test", limit=5.0) for _ in range(3)]
        assert await asyncio.gather(*(other.rows("select 2") for other in others)) == [[["2"]]] * 3
        assert await line.rows("select 1") == [["1"]]
        for other in others:
            await other.close()
