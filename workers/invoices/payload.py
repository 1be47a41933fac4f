"""The payload of ``shop.invoice.requested``: its fields, and how much each may hold."""

from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from workers.invoices.money import CURRENCIES

LARGEST_PAYLOAD: Final = 512 * 1024
"""Bytes. One of 741 KB, 2,000 lines of 40 different words, took Typst 3.8 to 6 s and 370 to 440 MiB."""


def _printed_on(lines: int) -> Callable[[str], str]:
    """A check that text has at most this many lines, and no control characters besides."""

    def check(text: str) -> str:
        count = len(text.splitlines())
        if count > lines:
            raise ValueError(f"has {count} lines; at most {lines} {'is' if lines == 1 else 'are'} allowed")
        for character in text:
            if character not in "\t\n\r" and (character < " " or "\x7f" <= character < "\xa0"):
                raise ValueError(f"holds the control character U+{ord(character):04X}")
        return text

    return check


Short = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printed_on(1))]
Description = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_printed_on(20))]
Notes = Annotated[str, Field(min_length=1, max_length=10_000), AfterValidator(_printed_on(200))]
Amount = Annotated[Decimal, Field(max_digits=28, decimal_places=9)]
Rate = Annotated[Decimal, Field(ge=0, le=1000, decimal_places=4)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Party(_Part):
    """Who sells or buys."""

    name: Short
    address: list[Short] = Field([], max_length=10)
    email: Short | None = None
    tax_id: Short | None = None


class Line(_Part):
    """What is sold."""

    description: Description
    quantity: Amount
    unit_price: Amount
    tax_rate: Rate | None = None


class Invoice(_Part):
    """The payload."""

    number: Short
    correction: Annotated[int, Field(strict=True, ge=1, le=999)] | None = None
    issued_on: date
    currency: str
    customer: Party
    seller: Party | None = None
    lines: list[Line] = Field(min_length=1, max_length=2000)
    notes: Notes | None = None
    total: Amount | None = None

    @field_validator("currency")
    @classmethod
    def _iso_4217(cls, value: str) -> str:
        if value not in CURRENCIES:
            raise ValueError('is not a currency code of ISO 4217, such as "EUR"')
        return value
