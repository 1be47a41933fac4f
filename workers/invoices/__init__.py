"""Invoices: an event ``shop.invoice.requested`` becomes a PDF, typeset by Typst from a template that users may edit.

The payload, where ``?`` marks what may be left out or null, and money is a JSON string or number, read exactly::

    {
      "number": "2026-0001",           "issued_on": "2026-11-21",     "currency": "EUR",
      "seller"?: {"name": "...", "address"?: ["...", ...], "email"?: "...", "tax_id"?: "..."},
      "customer": {as the seller},
      "lines": [{"description": "...", "quantity": "2", "unit_price": "9.90", "tax_rate"?: "19"}, ...],
      "notes"?: "...",                 "total"?: "23.56",             "correction"?: 1
    }

A line comes to quantity times unit price, rounded half up to the currency's minor unit. Tax (`tax_rate`, in percent)
is added once per rate, on the sum of that rate's lines, rounded likewise. `total` is the sum that the shop expects,
tax included: an invoice that comes to another is rejected. So is a payload with an unknown or illegal field.

A number is one event's: another event with it is rejected, and the first one's file stays as it is. To correct an
invoice under its number, an event says which `correction` of it this is, 1 or 2 or ..., and gets a file of its own,
since what was sent to a customer must remain readable, and since events may come in any order.

The reply gets ``{"number", "correction", "path", "bytes", "sha256", "total"}``. One event gives the same file every
time, even when the template was changed meanwhile.
"""

import hashlib
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import ConfigDict, DirectoryPath, Field, FilePath, PlainValidator

from bridge.event import Event
from bridge.settings.models import Size, SomeDuration
from workers.handler import Options, Reject, Result, handler
from workers.invoices.money import Totals, rounded, totals
from workers.invoices.payload import LARGEST_PAYLOAD, Invoice
from workers.invoices.rendering import MissingGlyphsError, TemplateError, Typesetters
from workers.invoices.stamp import event_of, stamped
from workers.invoices.store import Store, file_name, open_store

__all__ = ["TEMPLATE", "InvoiceOptions", "TemplateError", "render"]

TEMPLATE: Final = Path(__file__).parent / "invoice.typ"
"""The template that is shipped."""


class InvoiceOptions(Options):
    """``[workers.invoices.options]``."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    path: Annotated[Store, PlainValidator(open_store)]
    """A directory that exists, or the URL of an object store: ``s3://bucket/prefix``, ``gs://``, ``az://``."""
    template: FilePath = TEMPLATE
    """A Typst template in place of the shipped one; it may read files of its own folder."""
    font_paths: tuple[DirectoryPath, ...] = ()
    """Folders with more fonts, for scripts that Typst's own (Latin, Greek, Cyrillic) and the system's lack."""
    system_fonts: bool = True
    """Whether the system's fonts are used, too. Without them, all machines give the same bytes."""
    time_limit: SomeDuration = 20.0
    """Seconds that Typst may take for one invoice."""
    memory_limit: Annotated[Size, Field(ge=64 << 20)] = 512 << 20
    """Bytes that a process of Typst may take. There are at most as many processes as cores."""


@handler("shop.invoice.requested", payload=Invoice, options=InvoiceOptions)
async def render(event: Event, invoice: Invoice, options: InvoiceOptions) -> Result:
    """Writes the invoice's PDF and returns where it is."""
    if len(event.payload) > LARGEST_PAYLOAD:
        raise Reject(f"the payload has {len(event.payload):,} bytes; an invoice may have {LARGEST_PAYLOAD:,}")
    sums = totals([(line.quantity, line.unit_price, line.tax_rate) for line in invoice.lines], invoice.currency)
    if invoice.total is not None and invoice.total != sums.gross:
        raise Reject(
            f"total: the event says {invoice.total:f} {invoice.currency}, but its lines come to {sums.gross:f}"
        )
    name = file_name(invoice.number, ".pdf" if invoice.correction is None else f"+{invoice.correction}.pdf")
    place = options.path.place(name)
    pdf = await options.path.get(name)
    if pdf is None:
        made = stamped(await _typeset(template_data(invoice, sums), event, options), event.id)
        pdf = made if await options.path.create(name, made) else await options.path.get(name)
    if pdf is None:
        raise FileNotFoundError(f"{place} was removed by somebody at this moment")
    if event_of(pdf) != event.id:
        raise Reject(_taken(invoice, place, event_of(pdf)))
    return {
        "number": invoice.number,
        "correction": invoice.correction,
        "path": place,
        "bytes": len(pdf),
        "sha256": hashlib.sha256(pdf).hexdigest(),
        "total": f"{sums.gross:f}",
    }


async def _typeset(data: dict[str, Any], event: Event, options: InvoiceOptions) -> bytes:
    typesetters = _typesetters(
        options.template, options.font_paths, options.system_fonts, options.time_limit, options.memory_limit
    )
    try:
        return await typesetters.typeset(data, event.time)
    except MissingGlyphsError as error:
        raise Reject(f"{error}; name a folder with such a font in font_paths, then replay the event") from None


def _taken(invoice: Invoice, place: str, holder: str | None) -> str:
    what = (
        f"number {invoice.number}"
        if invoice.correction is None
        else f"{invoice.number}, correction {invoice.correction}"
    )
    by = "a file that no event made" if holder is None else f"event {holder}"
    return f"{what}: is taken by {by} ({place}); a corrected invoice has a number of its own, or the next `correction`"


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


@cache
def _typesetters(
    template: Path, font_paths: tuple[Path, ...], system_fonts: bool, time_limit: float, memory_limit: int
) -> Typesetters:
    return Typesetters(
        template, font_paths, system_fonts=system_fonts, time_limit=time_limit, memory_limit=memory_limit
    )


def _price(price: Decimal, currency: str) -> str:
    """A unit price with at least the currency's minor unit; finer ones stay as they are."""
    whole = rounded(price, currency)
    return f"{whole if whole == price else price:f}"
