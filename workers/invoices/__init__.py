"""Invoices: an event ``shop.invoice.requested`` becomes a PDF, typeset by Typst from a template that users may edit.

The payload, where ``?`` marks what may be left out or null, and money is a JSON string or number, read exactly::

    {
      "number": "2026-0001",           "issued_on": "2026-11-21",     "currency": "EUR",
      "seller"?: {"name": "...", "address"?: ["...", ...], "email"?: "...", "tax_id"?: "..."},
      "customer": {as the seller},
      "lines": [{"description": "...", "quantity": "2", "unit_price": "9.90", "tax_rate"?: "19"}, ...],
      "notes"?: "...",                 "total"?: "23.56"
    }

A line comes to quantity times unit price, rounded half up to the currency's minor unit. Tax (`tax_rate`, in percent)
is added once per rate, on the sum of that rate's lines, rounded likewise. `total` is the sum that the shop expects,
tax included: an invoice that comes to another is rejected. So is a payload with an unknown or illegal field.

The reply gets ``{"number", "path", "bytes", "sha256", "total"}``. One event gives the same bytes every time, as long
as template and fonts are the same; an invoice that is rendered again replaces its file.
"""

import asyncio
import hashlib
import json
from datetime import date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import typst
from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, FilePath, ValidationError, field_validator

from bridge.event import Event
from workers.handler import Options, Reject, Result, explain, handler
from workers.invoices.files import file_name, write_whole
from workers.invoices.money import CURRENCIES, Totals, rounded, totals

TEMPLATE: Final = Path(__file__).parent / "invoice.typ"
"""The template that is shipped."""

Text = Annotated[str, Field(min_length=1, max_length=2000)]
Amount = Annotated[Decimal, Field(max_digits=28, decimal_places=9)]
Rate = Annotated[Decimal, Field(ge=0, le=1000, decimal_places=4)]


class InvoiceOptions(Options):
    """``[workers.invoices.options]``."""

    directory: DirectoryPath
    """The folder that gets the PDFs; it must exist."""
    template: FilePath = TEMPLATE
    """A Typst template in place of the shipped one; it may read files of its own folder."""
    font_paths: tuple[DirectoryPath, ...] = ()
    """Folders with more fonts, for scripts that Typst's own (Latin, Greek, Cyrillic) and the system's lack."""
    system_fonts: bool = True
    """Whether the system's fonts are used, too. Without them, all machines give the same bytes."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Party(_Part):
    """Who sells or buys."""

    name: Text
    address: list[Text] = Field([], max_length=10)
    email: Text | None = None
    tax_id: Text | None = None


class Line(_Part):
    """What is sold."""

    description: Text
    quantity: Amount
    unit_price: Amount
    tax_rate: Rate | None = None


class Invoice(_Part):
    """The payload."""

    number: Annotated[str, Field(min_length=1, max_length=200)]
    issued_on: date
    currency: str
    customer: Party
    seller: Party | None = None
    lines: list[Line] = Field(min_length=1, max_length=10_000)
    notes: Text | None = None
    total: Amount | None = None

    @field_validator("currency")
    @classmethod
    def _iso_4217(cls, value: str) -> str:
        if value not in CURRENCIES:
            raise ValueError('is not a currency code of ISO 4217, such as "EUR"')
        return value


class TemplateError(Exception):
    """The template does not compile. The text is Typst's diagnostic, with file, line and column."""


@handler("shop.invoice.requested", options=InvoiceOptions)
async def render(event: Event, options: InvoiceOptions) -> Result:
    """Writes the invoice's PDF and returns where it is."""
    invoice = parse(event.payload)
    sums = totals([(line.quantity, line.unit_price, line.tax_rate) for line in invoice.lines], invoice.currency)
    if invoice.total is not None and invoice.total != sums.gross:
        raise Reject(
            f"total: the event says {invoice.total:f} {invoice.currency}, but its lines come to {sums.gross:f}"
        )
    path = options.directory.resolve() / file_name(invoice.number, ".pdf")

    def typeset_and_write() -> bytes:
        content = typeset(template_data(invoice, sums), event.time, options)
        write_whole(path, content)
        return content

    pdf = await asyncio.to_thread(typeset_and_write)
    return {
        "number": invoice.number,
        "path": str(path),
        "bytes": len(pdf),
        "sha256": hashlib.sha256(pdf).hexdigest(),
        "total": f"{sums.gross:f}",
    }


def parse(payload: bytes) -> Invoice:
    """The invoice in a payload; numbers are read as exact decimals. Raises Reject, naming the wrong fields."""
    try:
        return Invoice.model_validate(json.loads(payload, parse_float=Decimal))
    except ValidationError as error:
        raise Reject(explain(error, Invoice).replace("\n", "; ")) from None
    except (ValueError, RecursionError) as error:
        raise Reject(f"the payload is not JSON: {error}") from None


def template_data(invoice: Invoice, sums: Totals) -> dict[str, Any]:
    """What the template reads: the payload's fields, the amounts of lines and taxes, and the sums. Numbers are text."""
    return {
        **invoice.model_dump(mode="json", exclude={"lines", "total"}),
        "lines": [
            {
                "description": line.description,
                "quantity": f"{line.quantity:f}",
                "unit_price": _price(line.unit_price, invoice.currency),
                "tax_rate": None if line.tax_rate is None else f"{line.tax_rate:f}",
                "amount": f"{amount:f}",
            }
            for line, amount in zip(invoice.lines, sums.lines, strict=True)
        ],
        "net": f"{sums.net:f}",
        "taxes": [{"rate": f"{tax.rate:f}", "net": f"{tax.net:f}", "amount": f"{tax.amount:f}"} for tax in sums.taxes],
        "total": f"{sums.gross:f}",
    }


def typeset(data: dict[str, Any], time: datetime, options: InvoiceOptions) -> bytes:
    """The PDF; `time` is its creation date. Takes some milliseconds of CPU. Raises TemplateError."""
    try:
        return typst.compile(
            options.template.resolve(),
            font_paths=_fonts(options.font_paths, options.system_fonts),
            sys_inputs={"data": json.dumps(data, ensure_ascii=False)},
            # Typst refuses fractions of a second.
            timestamp=time.replace(microsecond=0),
        )
    except typst.TypstError as error:
        raise TemplateError(error.diagnostic.strip() or error.message) from error


@cache
def _fonts(paths: tuple[Path, ...], system_fonts: bool) -> typst.Fonts:
    # Searching the system's folders takes longer than typesetting, so it is done once.
    return typst.Fonts(include_system_fonts=system_fonts, font_paths=list(paths))


def _price(price: Decimal, currency: str) -> str:
    """A unit price with at least the currency's minor unit; finer ones stay as they are."""
    whole = rounded(price, currency)
    return f"{whole if whole == price else price:f}"
