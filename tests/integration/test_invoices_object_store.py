"""Invoices in an object store: an S3 server, and one that says no in the ways that servers do."""

import asyncio
import base64
import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from bridge.errors import SettingsError
from bridge.event import Event
from tests.support.events import make_event
from workers import Reject
from workers.invoices import InvoiceOptions, render
from workers.invoices.stamp import event_of
from workers.invoices.store import ObjectStore, StoreError, open_store

SECRET = "s3cr3t-key-of-the-shop"
KEY_ID = "AKIAEXAMPLEOFTHESHOP"

EVENT_ID = "5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a01"
OTHER_ID = "5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a02"


def requested(event_id: str = EVENT_ID, **changes: Any) -> Event:
    payload = {
        "number": "2026/0001",
        "issued_on": "2026-11-21",
        "currency": "EUR",
        "customer": {"name": "Customer One"},
        "lines": [{"description": "Tea", "quantity": "1", "unit_price": "4.00"}],
    }
    return make_event(
        id=event_id,
        topic="shop.invoice.requested",
        payload=json.dumps(payload | changes).encode(),
        time=datetime(2026, 11, 21, tzinfo=UTC),
    )


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    return monkeypatch


@pytest.fixture
def s3(credentials: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server with the bucket ``shop``; a client that is not the worker's."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="shop")
    yield client
    client.close()
    server.stop()
    s3_backends.reset()


@pytest.fixture
def refusing(credentials: pytest.MonkeyPatch) -> Iterator["type[Refusing]"]:
    """A server that answers everything with `Refusing.status` and `Refusing.body`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    credentials.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield Refusing
    server.shutdown()
    thread.join()
    server.server_close()


class Refusing(BaseHTTPRequestHandler):
    status = 500
    body = ""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body.encode())

    do_PUT = do_GET  # noqa: N815 - the name that the base class calls

    def log_message(self, *_: object) -> None:
        pass


async def test_an_invoice_is_one_object_below_the_prefix(s3: Any) -> None:
    result = await render(requested(), InvoiceOptions(path="s3://shop/invoices/2026/", system_fonts=False))
    assert result is not None
    assert result["path"] == "s3://shop/invoices/2026/2026%2F0001.pdf"
    found = s3.get_object(Bucket="shop", Key="invoices/2026/2026%2F0001.pdf")
    content = found["Body"].read()
    assert found["ContentType"] == "application/pdf"
    assert event_of(content) == EVENT_ID
    assert len(content) == result["bytes"]


async def test_in_an_object_store_too_a_number_is_one_events(s3: Any) -> None:
    options = InvoiceOptions(path="s3://shop", system_fonts=False)
    first = await render(requested(), options)
    with pytest.raises(Reject, match=f"number 2026/0001: is taken by event {EVENT_ID}"):
        await render(requested(OTHER_ID), options)
    assert await render(requested(), options) == first
    corrected = await render(requested(OTHER_ID, correction=1), options)
    assert corrected is not None
    assert corrected["path"] == "s3://shop/2026%2F0001+1.pdf"


async def test_a_name_from_a_payload_never_leaves_the_prefix(s3: Any) -> None:
    options = InvoiceOptions(path="s3://shop/invoices", system_fonts=False)
    for number in ("../../etc/passwd", "..", "/", "a?b#c", "%2e%2e/x", "*"):
        await render(requested(number=number), options)
    keys = [found["Key"] for found in s3.list_objects_v2(Bucket="shop")["Contents"]]
    assert len(keys) == 6
    assert all(re.fullmatch(r"invoices/[^/]+\.pdf", key) for key in keys)


async def test_a_bucket_that_is_missing_is_named(s3: Any) -> None:
    with pytest.raises(StoreError) as caught:
        await render(requested(), InvoiceOptions(path="s3://absent/invoices", system_fonts=False))
    assert str(caught.value) == (
        "cannot write s3://absent/invoices/2026%2F0001.pdf: there is no such bucket, or it lies elsewhere "
        "(404 NoSuchBucket)"
    )


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (403, "AccessDenied", "these credentials may not; they need the rights to read, list and create objects"),
        (403, "SignatureDoesNotMatch", "these credentials may not"),
        (401, "InvalidToken", "the credentials (AWS_...) are wrong or have expired"),
        (503, "SlowDown", "the object store has a problem"),
        (400, "ExpiredToken", "the object store has a problem"),
    ],
)
async def test_a_refusal_is_an_error_that_says_why_and_shows_no_secret(
    status: int, code: str, why: str, refusing: type[Refusing]
) -> None:
    refusing.status = status
    refusing.body = (
        f"<Error><Code>{code}</Code><Message>{SECRET}</Message><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId>"
        f"<StringToSign>AWS4-HMAC-SHA256 {SECRET}</StringToSign></Error>"
    )
    store = open_store("s3://shop/invoices")
    for verb in ("read", "write"):
        with pytest.raises(StoreError) as caught:
            await (store.get("1.pdf") if verb == "read" else store.create("1.pdf", b"x"))
        told = str(caught.value)
        assert told.startswith(f"cannot {verb} s3://shop/invoices/1.pdf: {why}")
        assert told.endswith(f" ({status} {code})")
        assert not caught.value.__cause__
        assert caught.value.__suppress_context__
        assert SECRET not in told
        assert KEY_ID not in told


async def test_a_server_that_is_gone_is_an_error_that_says_so(credentials: pytest.MonkeyPatch) -> None:
    credentials.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match=r"cannot read s3://shop/1\.pdf: no answer; check network and endpoint \(AWS_"):
        await open_store("s3://shop").get("1.pdf")


async def test_a_plain_endpoint_is_refused_unless_it_is_allowed(credentials: pytest.MonkeyPatch) -> None:
    credentials.delenv("AWS_ALLOW_HTTP")
    credentials.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="a plain http:// endpoint needs AWS_ALLOW_HTTP=true"):
        await open_store("s3://shop").get("1.pdf")


class Creating(BaseHTTPRequestHandler):
    """Stores what is sent with the words of Google's and Azure's protocols for "only if there is none"; without them it
    would replace. Neither's servers can run here: Google's emulators know no conditions, Azure's needs Node."""

    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = (self.headers.get("x-goog-if-generation-match"), self.headers.get("If-None-Match"))
        if wanted in {("0", None), (None, "*")} and self.path in self.objects:
            self._answer(409 if wanted[1] else 412)
        else:
            self.objects[self.path] = content
            self._answer(201)

    def do_GET(self) -> None:
        if self.path in self.objects:
            self._answer(200, self.objects[self.path])
        else:
            self._answer(404)

    def _answer(self, status: int, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def clouds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    Creating.objects = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Creating)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "shop")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(SECRET.encode()).decode())
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["gs", "az"])
async def test_google_and_azure_are_asked_to_create_and_never_to_replace(scheme: str, clouds: None) -> None:
    store = open_store(f"{scheme}://shop/invoices")
    assert await store.get("1.pdf") is None
    assert await store.create("1.pdf", b"the first")
    assert not await store.create("1.pdf", b"the second")
    assert await store.get("1.pdf") == b"the first"


async def test_of_events_with_one_number_at_the_same_moment_one_wins(s3: Any) -> None:
    options = InvoiceOptions(path="s3://shop", system_fonts=False, time_limit=31.0)
    ids = [f"5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0b{n:02}" for n in range(4)]
    results = await asyncio.gather(*(render(requested(one), options) for one in ids), return_exceptions=True)
    [winner] = [one for one, result in zip(ids, results, strict=True) if isinstance(result, dict)]
    assert sum(isinstance(result, Reject) and winner in str(result) for result in results) == 3


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("ftp://shop/x", r"ftp:// is none of s3://, gs://, az://"),
        ("s3://", r"is no URL of the form s3://bucket/prefix"),
        (
            f"s3://{KEY_ID}:{SECRET}@shop/x",
            r"is no URL of the form s3://bucket/prefix; credentials belong",
        ),
        (f"s3://shop/x?secret={SECRET}", r"is no URL of the form s3://bucket/prefix"),
        ("az://container/x", r"az://container/x cannot be opened: what the environment says \(AZURE_\.\.\.\) is inc"),
    ],
)
def test_a_wrong_url_is_a_mistake_in_the_settings(path: str, said: str) -> None:
    with pytest.raises(SettingsError, match=rf"workers\.invoices\.options\.path: {said}") as caught:
        render.configured({"path": path}, "invoices")
    assert SECRET not in str(caught.value)


def test_the_stores_of_google_and_microsoft_open_with_what_the_environment_says(
    credentials: pytest.MonkeyPatch,
) -> None:
    credentials.setenv("AZURE_STORAGE_ACCOUNT_NAME", "shop")
    for url in ("gs://shop/invoices", "az://container/invoices"):
        assert ObjectStore(url).place("1.pdf") == f"{url}/1.pdf"
