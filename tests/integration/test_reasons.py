"""Errors of handlers that quote what they were given: their reason, which is logged, does not."""

import psycopg
import pytest
from pydantic import BaseModel, ValidationError

from tests.support.servers import PostgresServer
from workers.reasons import reason_of


class Order(BaseModel):
    card: int
    lines: list[int]


def test_what_a_model_refuses_is_named_and_not_quoted() -> None:
    with pytest.raises(ValidationError) as raised:
        Order.model_validate({"card": "4242 s3cret", "lines": ["s3cret"]})
    assert "s3cret" in str(raised.value)
    assert reason_of(raised.value) == (
        "ValidationError: Order: card: Input should be a valid integer, unable to parse string as an integer; "
        "lines.0: Input should be a valid integer, unable to parse string as an integer"
    )


def test_a_row_that_postgresql_quotes_is_not_repeated(postgres: PostgresServer, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table card (number text primary key)")
        connection.execute("insert into card values ('s3cret')")
        with pytest.raises(psycopg.errors.UniqueViolation) as raised:
            connection.execute("insert into card values ('s3cret')")
    assert "s3cret" in str(raised.value)
    assert reason_of(raised.value) == ('UniqueViolation: duplicate key value violates unique constraint "card_pkey"')


def test_other_errors_keep_their_words() -> None:
    assert reason_of(ValueError("the printer is out of paper")) == "ValueError: the printer is out of paper"
    assert reason_of(psycopg.OperationalError("gone")) == "OperationalError: gone"
