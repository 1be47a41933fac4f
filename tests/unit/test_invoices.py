"""Invoices: what is accepted, what the PDF says, and that it is the same every time."""

import asyncio
import hashlib
import io
import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader

from bridge.errors import SettingsError
from workers import Event, Reject
from workers.invoices import TEMPLATE, InvoiceOptions, TemplateError, render
from workers.invoices.stamp import event_of as event_of_pdf
from workers.testing import make_event

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
LINE = PAYLOAD["lines"][0]

EVENT_ID = "5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a01"
OTHER_ID = "5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a02"


def event_of(payload: bytes | dict[str, Any], **changes: Any) -> Event:
    time = datetime(2026, 11, 21, 9, 30, 0, 123456, tzinfo=UTC)
    whole = {**payload, **changes} if isinstance(payload, dict) else payload
    return make_event("shop.invoice.requested", whole, id=EVENT_ID, time=time)


@pytest.fixture
def options(tmp_path: Path) -> InvoiceOptions:
    # The system's fonts differ from machine to machine.
    return InvoiceOptions(path=tmp_path, system_fonts=False)


async def rendered(event: Event, options: InvoiceOptions) -> PdfReader:
    result = await render(event, options)
    assert result is not None
    return PdfReader(io.BytesIO(Path(result["path"]).read_bytes()))


def words(reader: PdfReader) -> str:
    return " ".join("\n".join(page.extract_text() for page in reader.pages).split())


async def test_the_reply_tells_where_the_file_is_and_what_it_holds(options: InvoiceOptions, tmp_path: Path) -> None:
    result = await render(event_of(PAYLOAD), options)
    assert result is not None
    content = (tmp_path / "2026-0001.pdf").read_bytes()
    assert result == {
        "number": "2026-0001",
        "correction": None,
        "path": str(tmp_path / "2026-0001.pdf"),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "total": "34.26",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["2026-0001.pdf"]


async def test_the_text_of_the_pdf_holds_parties_lines_taxes_and_total(options: InvoiceOptions) -> None:
    text = words(await rendered(event_of(PAYLOAD), options))
    for part in ("Shop Ltd", "Customer One", "2026-11-21", "Teapot", "Tea", "Thank you.", "Page 1 of 1"):
        assert part in text
    # 2 x 9.90 = 19.80 and 0.25 x 40 = 10.00; 19 % of 19.80 = 3.762 and 7 % of 10.00 = 0.70.
    for amount in ("19.80", "10.00", "29.80 EUR", "3.76 EUR", "0.70 EUR", "34.26 EUR"):
        assert amount in text


async def test_the_same_event_gives_the_same_bytes(options: InvoiceOptions, tmp_path: Path) -> None:
    first = await render(event_of(PAYLOAD), options)
    (tmp_path / "2026-0001.pdf").unlink()
    second = await render(event_of(PAYLOAD), options)
    assert first == second


async def test_another_attempt_of_an_event_gives_the_first_ones_file_even_with_another_template(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    template = tmp_path / "own.typ"
    template.write_text("first", "utf-8")
    options = InvoiceOptions(path=tmp_path / "out", template=template)
    first = await render(event_of(PAYLOAD), options)
    template.write_text("#no-such-thing", "utf-8")
    assert await render(event_of(PAYLOAD), options) == first
    assert words(await rendered(event_of(PAYLOAD), options)) == "first"


async def test_another_event_with_the_same_number_is_rejected_naming_both(
    options: InvoiceOptions, tmp_path: Path
) -> None:
    first = await render(event_of(PAYLOAD), options)
    with pytest.raises(Reject, match=rf"number 2026-0001: is taken by event {EVENT_ID} \(.*/2026-0001\.pdf\)"):
        await render(event_of(PAYLOAD, notes="Changed.")._replace(id=OTHER_ID), options)
    assert await render(event_of(PAYLOAD), options) == first
    assert [file.name for file in tmp_path.iterdir()] == ["2026-0001.pdf"]


async def test_a_file_of_other_origin_is_never_replaced(options: InvoiceOptions, tmp_path: Path) -> None:
    (tmp_path / "2026-0001.pdf").write_bytes(b"%PDF of a bookkeeper")
    with pytest.raises(Reject, match="is taken by a file that no event made"):
        await render(event_of(PAYLOAD), options)
    assert (tmp_path / "2026-0001.pdf").read_bytes() == b"%PDF of a bookkeeper"


async def test_of_events_with_one_number_at_the_same_moment_one_wins(options: InvoiceOptions, tmp_path: Path) -> None:
    options = options.model_copy(update={"time_limit": 30.0})  # processes of this test's own event loop
    events = [event_of(PAYLOAD)._replace(id=str(uuid.uuid4())) for _ in range(8)]
    results = await asyncio.gather(*(render(event, options) for event in events), return_exceptions=True)
    [won] = [number for number, result in enumerate(results) if isinstance(result, dict)]
    assert event_of_pdf((tmp_path / "2026-0001.pdf").read_bytes()) == events[won].id
    assert all(
        isinstance(result, Reject) and events[won].id in str(result) for result in results if result is not results[won]
    )


async def test_a_correction_says_so_and_gets_a_file_of_its_own(options: InvoiceOptions, tmp_path: Path) -> None:
    await render(event_of(PAYLOAD), options)
    correction = event_of(PAYLOAD, correction=1, notes="Changed.")._replace(id=OTHER_ID)
    result = await render(correction, options)
    assert result is not None
    assert (result["number"], result["correction"]) == ("2026-0001", 1)
    assert result["path"] == str(tmp_path / "2026-0001+1.pdf")
    assert "Correction 1 of invoice 2026-0001" in words(await rendered(correction, options))
    assert "Changed." not in words(await rendered(event_of(PAYLOAD), options))
    with pytest.raises(Reject, match=rf"2026-0001, correction 1: is taken by event {OTHER_ID}"):
        await render(correction._replace(id=EVENT_ID), options)


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


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("李 Ltd", "U+674E 李"),
        ("Cup \U0001f600 Ltd", "U+1F600 \U0001f600"),
        ("ก Ltd", "U+0E01 ก"),
        ("李 and 小 and 李", "U+674E 李, U+5C0F 小"),
    ],
)
async def test_characters_that_no_font_has_are_rejected_by_name(
    name: str, missing: str, options: InvoiceOptions, tmp_path: Path
) -> None:
    with pytest.raises(Reject) as caught:
        await render(event_of(PAYLOAD, customer={"name": name}), options)
    assert str(caught.value).startswith(f"no font has {missing}; name a folder with such a font in font_paths")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "Ærøskøbing Straße Çelik Škoda Łódź Győr Țară Ħamrun Ísafjörður",
        "«Œuvre» – „Käse“ … ‘one’ ½ № 7 €100 £5 ™ © § ±2 °C",
        "Ωμέγα Καφές Ёлка Київ Ђорђе",
        "مرحبا",
        "e\u0301 \u200bx\u00ad\u200e \u202f\u00a0",
    ],
)
async def test_text_that_the_fonts_have_is_accepted(name: str, options: InvoiceOptions) -> None:
    await render(event_of(PAYLOAD, customer={"name": name}), options)


async def test_a_character_that_only_the_template_holds_is_the_templates_mistake(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "own.typ").write_text("請求書", "utf-8")
    options = InvoiceOptions(path=tmp_path / "out", template=tmp_path / "own.typ", system_fonts=False)
    with pytest.raises(TemplateError, match=r"請.*could not be displayed"):
        await render(event_of(PAYLOAD), options)


async def test_words_too_long_for_a_line_are_broken(options: InvoiceOptions) -> None:
    party = {"name": "W" * 200, "address": ["W" * 200], "email": "W" * 200, "tax_id": "W" * 200}
    changes = {"number": "W" * 200, "seller": party, "customer": party, "notes": "W" * 2000}
    reader = await rendered(event_of(PAYLOAD, lines=[LINE | {"description": "W" * 2000}], **changes), options)
    text = "\n".join(page.extract_text() for page in reader.pages)
    assert max(line.count("W") for line in text.splitlines()) <= 100
    assert text.count("W") == 2 * 4 * 200 + 2000 + 2000 + (1 + len(reader.pages)) * 200


async def test_the_pdf_is_made_for_archives(options: InvoiceOptions) -> None:
    metadata = (await rendered(event_of(PAYLOAD), options)).xmp_metadata
    assert metadata is not None
    assert (metadata.pdfaid_part, metadata.pdfaid_conformance) == ("3", "B")


async def test_the_largest_invoice_stays_within_the_limits(options: InvoiceOptions) -> None:
    lines = [LINE | {"description": f"Article {n} of several words, set anew: {n * 7}"} for n in range(2000)]
    result = await render(event_of(PAYLOAD, lines=lines), options)
    assert result is not None


async def test_markup_in_the_data_is_text(options: InvoiceOptions) -> None:
    name = '#panic("x") *bold* $x$ [a] \\ <b>'
    assert name in words(await rendered(event_of(PAYLOAD, customer={"name": name}), options))


async def test_an_expected_total_that_agrees_is_accepted(options: InvoiceOptions) -> None:
    result = await render(event_of(PAYLOAD, total="34.260"), options)
    assert result is not None
    assert result["total"] == "34.26"


async def test_an_expected_total_that_differs_by_a_cent_is_rejected(options: InvoiceOptions, tmp_path: Path) -> None:
    with pytest.raises(Reject, match=r"total: the event says 34\.27 EUR, but its lines come to 34\.26"):
        await render(event_of(PAYLOAD, total="34.27"), options)
    assert list(tmp_path.iterdir()) == []


async def test_json_numbers_are_read_exactly(options: InvoiceOptions) -> None:
    payload = json.dumps(PAYLOAD | {"lines": []}).replace(
        '"lines": []', '"lines": [{"description": "x", "quantity": 1, "unit_price": 12345678901234567.89}]'
    )
    result = await render(event_of(payload.encode()), options)
    assert result is not None
    assert result["total"] == "12345678901234567.89"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"{", "payload: is not JSON"),
        (b"\xff", "payload: is not JSON"),
        (b"[" * 100_000, "payload: is not JSON"),
        (b"[1]", "payload: must be an object of named fields"),
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
        (PAYLOAD | {"customer": {"name": "x" * 201}}, "customer.name: String should have at most 200 characters"),
        (PAYLOAD | {"customer": {"name": "a\nb"}}, "customer.name: has 2 lines; at most 1 is allowed"),
        (PAYLOAD | {"customer": {"name": "a\x07"}}, "customer.name: holds the control character U+0007"),
        (PAYLOAD | {"customer": {"name": "C", "address": ["x"] * 11}}, "customer.address: List should have at most 10"),
        (PAYLOAD | {"customer": {"name": "C", "email": "x" * 201}}, "customer.email: String should have at most 200"),
        (PAYLOAD | {"customer": {"name": "C", "tax_id": "x" * 201}}, "customer.tax_id: String should have at most 200"),
        (PAYLOAD | {"number": "x" * 201}, "number: String should have at most 200 characters"),
        (PAYLOAD | {"notes": "x" * 10_001}, "notes: String should have at most 10000 characters"),
        (PAYLOAD | {"notes": "\n" * 201}, "notes: has 201 lines; at most 200 are allowed"),
        (PAYLOAD | {"lines": [LINE] * 2001}, "lines: List should have at most 2000 items"),
        (
            PAYLOAD | {"lines": [LINE | {"description": "x" * 2001}]},
            "lines.0.description: String should have at most 2000",
        ),
        (PAYLOAD | {"lines": [LINE | {"description": "\n" * 21}]}, "lines.0.description: has 21 lines; at most 20 are"),
        (PAYLOAD | {"lines": [LINE | {"description": "x" * 2000}] * 300}, "the payload has 6"),
        (PAYLOAD | {"correction": 0}, "correction: Input should be greater than or equal to 1"),
        (PAYLOAD | {"correction": 1000}, "correction: Input should be less than or equal to 999"),
        (PAYLOAD | {"correction": True}, "correction: Input should be a valid integer"),
    ],
)
async def test_a_wrong_payload_is_rejected_naming_the_field(
    payload: bytes | dict[str, Any], reason: str, options: InvoiceOptions, tmp_path: Path
) -> None:
    with pytest.raises(Reject) as caught:
        await render(event_of(payload), options)
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


async def test_a_template_of_the_users_replaces_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    template = tmp_path / "own.typ"
    template.write_text("#let data = json(bytes(sys.inputs.data))\nRechnung #data.number über #data.total", "utf-8")
    options = InvoiceOptions(path=tmp_path / "out", template=template)
    assert words(await rendered(event_of(PAYLOAD), options)) == "Rechnung 2026-0001 über 34.26"
    template.write_text("edited", "utf-8")
    assert words(await rendered(event_of(PAYLOAD, number="2"), options)) == "edited"


async def test_an_error_in_the_template_is_told_with_file_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    template = tmp_path / "own.typ"
    template.write_text("first line\n#no-such-thing", "utf-8")
    with pytest.raises(TemplateError, match=r"(?s)unknown variable: no-such-thing.*own\.typ:2:1"):
        await render(event_of(PAYLOAD), InvoiceOptions(path=tmp_path / "out", template=template))
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
    with pytest.raises(SettingsError, match=r"workers\.invoices\.options\.path: is no directory that exists"):
        render.configured({"path": str(tmp_path / "absent")}, "invoices")


def test_the_shipped_template_lies_in_the_package() -> None:
    assert TEMPLATE.is_file()
