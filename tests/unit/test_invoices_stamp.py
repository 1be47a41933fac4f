"""The event that a PDF names: it is read back, nothing else passes for it, and the PDF stays one."""

import io
import re

import pytest
import typst
from pypdf import PdfReader

from workers.invoices.stamp import event_of, stamped

EVENT_ID = "5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a01"
OTHER_ID = "5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a02"

PDF = typst.compile(b"Text", pdf_standards=["a-3b"], timestamp=0)


def test_a_stamped_pdf_names_its_event_and_an_unstamped_one_none() -> None:
    assert event_of(PDF) is None
    assert event_of(stamped(PDF, EVENT_ID)) == EVENT_ID


def test_a_stamped_pdf_is_read_as_before() -> None:
    reader = PdfReader(io.BytesIO(stamped(PDF, EVENT_ID)), strict=True)
    assert [page.extract_text() for page in reader.pages] == ["Text"]


def test_the_stamp_moves_no_byte_that_an_offset_points_to() -> None:
    content = stamped(PDF, EVENT_ID)
    found = re.search(rb"startxref\n(\d+)\n", PDF)
    assert found is not None
    assert content[: int(found[1]) + 4] == PDF[: int(found[1]) + 4]
    assert content.endswith(PDF[PDF.rindex(b"startxref") :])


def test_the_words_of_a_stamp_elsewhere_in_the_file_are_none() -> None:
    forged = (
        b"%PDF-1.7\n%pgbridge-event " + OTHER_ID.encode() + b"\nstartxref\n9\n%%EOF\n" + PDF.removeprefix(b"%PDF-1.7")
    )
    assert event_of(forged) is None
    assert event_of(stamped(forged, EVENT_ID)) == EVENT_ID


@pytest.mark.parametrize(("pdf", "event_id"), [(b"", EVENT_ID), (b"text", EVENT_ID), (PDF, "a\nb"), (PDF, "")])
def test_what_cannot_be_read_back_is_refused(pdf: bytes, event_id: str) -> None:
    with pytest.raises(ValueError, match="not the end of a PDF, or not the id"):
        stamped(pdf, event_id)
