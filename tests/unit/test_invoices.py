"""Invoices: what is accepted, what the PDF says, and that it is the same every time."""

import hashlib
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader

from bridge.errors import SettingsError
from tests.support.events import make_event
from workers import Event, Reject
from workers.invoices import TEMPLATE, InvoiceOptions, TemplateError, render

PAYLOAD: dict[str, Any] = {
    "number": "2026-0001",
    "issued_on": "2026-11-21",
    "currency": "EUR",
    "seller": {"name": "Shop Ltd", "address": ["Quay 1", "Dublin"], "email": "billing@shop.example", "tax_id": "IE1"},
    "customer": {"name": "Customer One", "address": ["Street 2", "Lyon"]},
    "lines": [
        {"description": "Teapot", "quantity": "2", "unit_price": "9.90", "tax_rate": "19"},
        {"description": "Tea", "quantity": "0.25", "unit_price": 40, "tax_rate": "7"},
    ],
    "notes": "Thank you.",
}


def event_of(payload: object, **changes: Any) -> Event:
    return event_with(json.dumps({**payload, **changes} if isinstance(payload, dict) else payload).encode())


def event_with(payload: bytes) -> Event:
    time = datetime(2026, 11, 21, 9, 30, 0, 123456, tzinfo=UTC)
    return make_event(
        id="5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a01", topic="shop.invoice.requested", payload=payload, time=time
    )


@pytest.fixture
def options(tmp_path: Path) -> InvoiceOptions:
    # The system's fonts differ from machine to machine.
    return InvoiceOptions(directory=tmp_path, system_fonts=False)


async def rendered(event: Event, options: InvoiceOptions) -> PdfReader:
    result = await render(event, options)
    assert result is not None
    return PdfReader(io.BytesIO(Path(result["path"]).read_bytes()))


def words(reader: PdfReader) -> str:
    return " ".join("\n".join(page.extract_text() for page in reader.pages).split())


async def test_the_reply_tells_where_the_file_is_and_what_it_holds(options: InvoiceOptions) -> None:
    result = await render(event_of(PAYLOAD), options)
    assert result is not None
    content = (options.directory / "2026-0001.pdf").read_bytes()
    assert result == {
        "number": "2026-0001",
        "path": str(options.directory / "2026-0001.pdf"),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "total": "34.26",
    }
    assert [file.name for file in options.directory.iterdir()] == ["2026-0001.pdf"]


async def test_the_text_of_the_pdf_holds_parties_lines_taxes_and_total(options: InvoiceOptions) -> None:
    text = words(await rendered(event_of(PAYLOAD), options))
    for part in ("Shop Ltd", "Customer One", "2026-11-21", "Teapot", "Tea", "Thank you.", "Page 1 of 1"):
        assert part in text
    # 2 x 9.90 = 19.80 and 0.25 x 40 = 10.00; 19 % of 19.80 = 3.762 and 7 % of 10.00 = 0.70.
    for amount in ("19.80", "10.00", "29.80 EUR", "3.76 EUR", "0.70 EUR", "34.26 EUR"):
        assert amount in text


async def test_the_same_event_gives_the_same_bytes(options: InvoiceOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await render(event_of(PAYLOAD), options)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    second = await render(event_of(PAYLOAD), options)
    assert first == second


async def test_the_creation_date_is_the_events_time_in_whole_seconds(options: InvoiceOptions) -> None:
    metadata = (await rendered(event_of(PAYLOAD), options)).metadata
    assert metadata is not None
    assert metadata.creation_date == datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
    assert metadata.title == "Invoice 2026-0001"


async def test_a_long_invoice_repeats_its_header_and_counts_its_pages(options: InvoiceOptions) -> None:
    lines = [{"description": f"Article {n:03}", "quantity": "1", "unit_price": "1.00"} for n in range(150)]
    reader = await rendered(event_of(PAYLOAD, lines=lines), options)
    pages = [page.extract_text() for page in reader.pages]
    assert len(pages) >= 4
    for number, page in enumerate(pages, 1):
        assert f"Page {number} of {len(pages)}" in " ".join(page.split())
        assert ("Unit price" in page) == ("Article" in page)
    text = words(reader)
    assert all(f"Article {n:03}" in text for n in range(150))
    assert "150.00 EUR" in text


async def test_latin_greek_and_cyrillic_names_are_legible_without_system_fonts(options: InvoiceOptions) -> None:
    name = "Łukasz Þór Nguyễn Ωμέγα Жуковский"
    reader = await rendered(event_of(PAYLOAD, customer={"name": name}), options)
    assert name in words(reader)


async def test_markup_in_the_data_is_text(options: InvoiceOptions) -> None:
    name = '#panic("x") *bold* $x$ [a] \\ <b>'
    assert name in words(await rendered(event_of(PAYLOAD, customer={"name": name}), options))


async def test_an_expected_total_that_agrees_is_accepted(options: InvoiceOptions) -> None:
    result = await render(event_of(PAYLOAD, total="34.260"), options)
    assert result is not None
    assert result["total"] == "34.26"


async def test_an_expected_total_that_differs_by_a_cent_is_rejected(options: InvoiceOptions) -> None:
    with pytest.raises(Reject, match=r"total: the event says 34\.27 EUR, but its lines come to 34\.26"):
        await render(event_of(PAYLOAD, total="34.27"), options)
    assert list(options.directory.iterdir()) == []


async def test_json_numbers_are_read_exactly(options: InvoiceOptions) -> None:
    payload = json.dumps(PAYLOAD | {"lines": []}).replace(
        '"lines": []', '"lines": [{"description": "x", "quantity": 1, "unit_price": 12345678901234567.89}]'
    )
    result = await render(event_with(payload.encode()), options)
    assert result is not None
    assert result["total"] == "12345678901234567.89"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"{", "the payload is not JSON"),
        (b"\xff", "the payload is not JSON"),
        (b"[" * 100_000, "the payload is not JSON"),
        (b"[1]", "Input should be a valid dictionary"),
        (PAYLOAD | {"number": ""}, "number: "),
        (PAYLOAD | {"number": None}, "number: "),
        (PAYLOAD | {"issued_on": "21.11.2026"}, "issued_on: "),
        (PAYLOAD | {"currency": "EURO"}, "currency: is not a currency code of ISO 4217"),
        (PAYLOAD | {"lines": []}, "lines: "),
        (PAYLOAD | {"customer": {}}, "customer.name: is missing"),
        (PAYLOAD | {"curency": "EUR"}, "curency: unknown key"),
        (PAYLOAD | {"lines": [{"description": "x", "quantity": "two", "unit_price": "1"}]}, "lines.0.quantity: "),
        (PAYLOAD | {"lines": [{"description": "x", "quantity": "NaN", "unit_price": "1"}]}, "lines.0.quantity: "),
        (PAYLOAD | {"lines": [{"description": "x", "quantity": "1", "unit_price": "1e999"}]}, "lines.0.unit_price: "),
        (
            PAYLOAD | {"lines": [{"description": "x", "quantity": "1", "unit_price": "1", "tax_rate": "-1"}]},
            "lines.0.tax_rate: ",
        ),
        (PAYLOAD | {"customer": {"name": "\ud800"}}, "customer.name: "),
    ],
)
async def test_a_wrong_payload_is_rejected_naming_the_field(
    payload: bytes | dict[str, Any], reason: str, options: InvoiceOptions
) -> None:
    event = event_with(payload) if isinstance(payload, bytes) else event_of(payload)
    with pytest.raises(Reject) as caught:
        await render(event, options)
    assert reason in str(caught.value)
    assert list(options.directory.iterdir()) == []


async def test_a_template_of_the_users_replaces_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    template = tmp_path / "own.typ"
    template.write_text("#let data = json(bytes(sys.inputs.data))\nRechnung #data.number über #data.total", "utf-8")
    options = InvoiceOptions(directory=tmp_path / "out", template=template)
    assert words(await rendered(event_of(PAYLOAD), options)) == "Rechnung 2026-0001 über 34.26"
    template.write_text("edited", "utf-8")
    assert words(await rendered(event_of(PAYLOAD), options)) == "edited"


async def test_an_error_in_the_template_is_told_with_file_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    template = tmp_path / "own.typ"
    template.write_text("first line\n#no-such-thing", "utf-8")
    with pytest.raises(TemplateError, match=r"(?s)unknown variable: no-such-thing.*own\.typ:2:1"):
        await render(event_of(PAYLOAD), InvoiceOptions(directory=tmp_path / "out", template=template))
    assert list((tmp_path / "out").iterdir()) == []


async def test_an_invoice_without_optional_parts_renders(options: InvoiceOptions) -> None:
    payload = {
        "number": "7",
        "issued_on": "2026-11-21",
        "currency": "JPY",
        "customer": {"name": "C"},
        "lines": [{"description": "x", "quantity": "3", "unit_price": "-100"}],
    }
    text = words(await rendered(event_of(payload), options))
    assert "−300 JPY" in text


def test_a_folder_that_does_not_exist_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"workers\.invoices\.options\.directory: Path does not point to a dir"):
        render.configured({"directory": str(tmp_path / "absent")}, "invoices")


def test_the_shipped_template_lies_in_the_package() -> None:
    assert TEMPLATE.is_file()
