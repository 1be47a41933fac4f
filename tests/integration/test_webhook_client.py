"""The client against receivers that behave badly: nothing inside is connected to, and nothing outlasts its time."""

import asyncio
import gc
import socket
import time
import tracemalloc
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge import __version__
from tests.support.certificates import Certificate, self_signed
from tests.support.http_proxy import HttpProxy
from tests.support.scripted_names import ScriptedNames
from tests.support.until import until
from tests.support.webhook_receiver import WebhookReceiver
from workers.webhooks.addresses import Network
from workers.webhooks.client import MOST_OF_ANSWER, Answer, WebhookClient

LOOPBACK = ip_network("127.0.0.0/8")
NAME = "hooks.example.com"
SHORT = 0.4
"""Seconds, where a time-out is what a test wants."""

MARGIN = 10.0
"""Seconds that a busy machine may take on top, and far less than any receiver here would like."""


@asynccontextmanager
async def client_of(
    *, timeout: float = 20.0, allow: Sequence[Network] = (LOOPBACK,), **more: Any
) -> AsyncIterator[WebhookClient]:
    client = WebhookClient(timeout=timeout, allow=allow, **more)
    yield client
    await client.aclose()


def names(*addresses: str, then: Sequence[str] | None = None) -> ScriptedNames:
    return ScriptedNames({NAME: [addresses] if then is None else [addresses, then]})


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("tls"), name=f"DNS:{NAME},IP:127.0.0.1")


@pytest.fixture
def secure(certificate: Certificate) -> Iterator[WebhookReceiver]:
    with WebhookReceiver(certificate=certificate) as receiver:
        yield receiver


async def post(client: WebhookClient, url: str, body: bytes = b"{}") -> Answer:
    return await client.post(url, body, {"Content-Type": "application/json"})


# What is sent


async def test_the_body_and_the_headers_arrive_as_given(receiver: WebhookReceiver) -> None:
    body = bytes(range(256)) * 1000
    async with client_of() as client:
        answer = await client.post(
            receiver.url("/status/202?body=3"), body, {"webhook-id": "m", "X-Custom": 'a, b; c="d"'}
        )
    (request,) = receiver.requests
    assert (answer.status, answer.body, answer.error, answer.refused) == (202, b"xxx", "", False)
    assert 0 < answer.duration < MARGIN
    assert request.body == body
    assert request.path == "/status/202?body=3"
    assert request.headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "content-length": str(len(body)),
        "user-agent": f"pgbridge/{__version__}",
        "webhook-id": "m",
        "x-custom": 'a, b; c="d"',
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("X", "a\r\nEvil: b"), ("X", "a\nb"), ("X", "a\x00b"), ("X", " a"), ("X", "a\n"), ("X", "é")),
        *(("X\r\nEvil", "b"), ("X:", "b"), ("", "b"), ("X Y", "b"), ("É", "b")),
        *(("Host", "inside"), ("content-length", "0"), ("Transfer-Encoding", "chunked"), ("Connection", "close")),
    ],
)
async def test_a_header_that_would_be_another_request_is_the_callers_error(
    receiver: WebhookReceiver, name: str, value: str
) -> None:
    async with client_of() as client:
        with pytest.raises(ValueError, match="header") as error:
            await client.post(receiver.url(), b"", {name: value})
    assert "inside" not in str(error.value)
    assert receiver.connections() == 0


# Where nothing is sent

LITERALS = {
    "loopback": "127.0.0.1",
    "mapped": "[::ffff:127.0.0.1]",
    "mapped in hexadecimal": "[::ffff:7f00:1]",
    "compatible": "[::127.0.0.1]",
    "NAT64": "[64:ff9b::127.0.0.1]",
    "6to4": "[2002:7f00:1::1]",
    "this host": "0.0.0.0",  # noqa: S104
    "unspecified": "[::]",
    "another loopback": "127.0.0.2",
    "one number": "2130706433",
    "hexadecimal": "0x7f.1",
    "one hexadecimal number": "0x7f000001",
    "octal": "0177.0.0.1",
    "two parts": "127.1",
    "zero": "0",
    "localhost": "localhost",
    "localhost in capitals": "LocalHost",
    "localhost, full stop": "localhost.",
    "below localhost": "a.localhost",
    "full stop": "127.0.0.1.",
    "full-width digits": "\uff11\uff12\uff17.0.0.1",
    "circled digits": "\u2460\u2461\u2466.0.0.1",
    "percent-encoded": "%31%32%37.0.0.1",
    "NUL": "127.0.0.1%00.example.com",
    "a user before it": "8.8.8.8@127.0.0.1",
    "a backslash before it": "8.8.8.8\\@127.0.0.1",
    "a fragment behind it": "127.0.0.1#.example.com",
    "a line break in it": "127.0.0.1\r\n",
    "the host's own name": socket.gethostname(),
}


@pytest.mark.parametrize("scheme", ["https", "http"])
@pytest.mark.parametrize("host", LITERALS.values(), ids=LITERALS)
async def test_no_form_of_an_inside_host_reaches_the_receiver(
    receiver: WebhookReceiver, secure: WebhookReceiver, host: str, scheme: str
) -> None:
    target = secure if scheme == "https" else receiver
    async with client_of(allow=()) as client:  # by the real resolver
        answer = await post(client, f"{scheme}://{host}:{target.port}/status/200")
    assert answer.status is None
    assert answer.refused or "does not resolve" in answer.error
    assert target.connections() == 0


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",),
        ("::ffff:127.0.0.1",),
        ("8.8.8.8", "127.0.0.1"),
        ("127.0.0.1", "8.8.8.8"),
        ("2606:4700::1", "8.8.8.8", "::ffff:7f00:1"),
        ("64:ff9b::127.0.0.1",),
        ("::1",),
        ("fe80::1%lo",),
        ("0.0.0.0",),  # noqa: S104
    ],
    ids=" ".join,
)
async def test_a_name_with_an_address_inside_is_refused_whole(
    receiver: WebhookReceiver, secure: WebhookReceiver, addresses: tuple[str, ...]
) -> None:
    async with client_of(allow=(), resolve=names(*addresses)) as client:
        for target in (receiver, secure):
            answer = await post(client, target.url(host=NAME))
            assert (answer.status, answer.refused) == (None, True)
            assert answer.error.startswith(f"{NAME} is ")
            assert target.connections() == 0


async def test_dns_that_changes_its_mind_after_the_check_finds_nothing_to_change(
    receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    asked: list[Any] = []
    resolve = loop.getaddrinfo

    async def getaddrinfo(host: Any, *args: Any, **more: Any) -> Any:
        asked.append(host)
        return await resolve(host, *args, **more)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    script = names("127.0.0.1", then=["127.0.0.2"])
    with WebhookReceiver("127.0.0.2", port=receiver.port) as inside:
        async with client_of(allow=[ip_network("127.0.0.1")], resolve=script) as client:
            assert (await post(client, receiver.url("/status/200", NAME))).status == 200
            assert script.asked == [NAME]
            assert NAME not in asked  # and nobody else has asked, of whom the check would not know
            # A kept connection is to the address that was checked; a new one is checked again.
            assert (await post(client, receiver.url("/leave", NAME))).status == 200
            assert script.asked == [NAME]
            await until(lambda: receiver.open == 0)
            answer = await post(client, receiver.url("/status/200", NAME))
            assert (answer.refused, answer.error) == (True, f"{NAME} is 127.0.0.2, a loopback address")
        assert inside.connections() == 0
    assert len(receiver.requests) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_answer_and_never_followed(receiver: WebhookReceiver, status: int) -> None:
    with WebhookReceiver("127.0.0.2") as inside:
        async with client_of() as client:
            raw = f"HTTP/1.1 {status} Go\r\nLocation: {inside.url()}\r\nContent-Length: 0\r\n\r\n".encode().hex()
            answer = await post(client, receiver.url(f"/raw?hex={raw}"))
            assert (answer.status, answer.error) == (status, "")
            assert (await post(client, receiver.url(f"/redirect?to={inside.url()}"))).status == 302
        assert inside.connections() == 0


async def test_http_is_only_for_what_is_allowed(receiver: WebhookReceiver) -> None:
    async with client_of(resolve=ScriptedNames({NAME: [["8.8.8.8"]], "mixed": [["127.0.0.1", "8.8.8.8"]]})) as client:
        for url in ("http://8.8.8.8/", f"http://{NAME}/", receiver.url(host="mixed")):
            answer = await post(client, url)
            assert answer.refused
            assert "http is for these only" in answer.error
    assert receiver.connections() == 0


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://user:secret@hooks.example.com/secret", "a URL with a user or password is not called"),
        ("https://hooks.example.com/secret#a", "a URL with a fragment (#) is not called"),
        ("ftp://hooks.example.com/secret", "the URL does not begin with https://"),
        ("https://10.0.0.7/secret", "10.0.0.7 is a private address"),
        ("https://[fd00::1]/secret", "fd00::1 is a private address (unique local)"),
    ],
)
async def test_a_refusal_says_why_and_shows_no_secret(url: str, error: str) -> None:
    async with client_of() as client:
        answer = await post(client, url)
    assert (answer.refused, answer.error, answer.status) == (True, error, None)


async def test_a_name_that_does_not_resolve_is_an_error_and_no_refusal() -> None:
    async with client_of(resolve=ScriptedNames({"empty": [[]]})) as client:
        answer = await post(client, f"https://{NAME}/")
        assert (answer.refused, answer.error) == (False, f"the name {NAME} does not resolve: Name or service not known")
        assert "has no addresses" in (await post(client, "https://empty/")).error


async def test_the_next_address_is_tried_where_one_cannot_be_reached(receiver: WebhookReceiver) -> None:
    async with client_of(resolve=names("127.0.0.3", "127.0.0.1")) as client:
        assert (await post(client, receiver.url(host=NAME))).status == 200


async def test_an_address_that_is_silent_leaves_time_for_the_next(certificate: Certificate) -> None:
    with WebhookReceiver() as receiver, socket.socket() as silent:
        # A queue that is full: the kernel drops what else comes, as a firewall would.
        silent.bind(("127.0.0.2", receiver.port))
        silent.listen(0)
        fill = [socket.socket() for _ in range(4)]
        for each in fill:
            each.setblocking(False)
            each.connect_ex(silent.getsockname())
        async with client_of(timeout=3.0, resolve=names("127.0.0.2", "127.0.0.1")) as client:
            answer = await post(client, receiver.url(host=NAME))
        for each in fill:
            each.close()
    assert answer.status == 200
    assert answer.duration < 3.0


async def test_a_port_where_nobody_listens_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with client_of() as client:
        assert (await post(client, f"http://127.0.0.1:{port}/")).error == f"127.0.0.1:{port}: connection refused"


# What comes back


@pytest.mark.parametrize("status", [200, 204, 299, 304, 400, 404, 410, 429, 500, 502, 503, 504, 599])
async def test_a_status_is_an_answer(receiver: WebhookReceiver, status: int) -> None:
    async with client_of() as client:
        answer = await post(client, receiver.url(f"/status/{status}"))
    assert (answer.status, answer.error, answer.retry_after) == (status, "", None)


async def retry_after(receiver: WebhookReceiver, header: str) -> float | None:
    raw = f"HTTP/1.1 503 Busy\r\nRetry-After: {header}\r\nContent-Length: 0\r\n\r\n".encode().hex()
    async with client_of() as client:
        answer = await post(client, receiver.url(f"/raw?hex={raw}"))
    assert answer.status == 503
    return answer.retry_after


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *(("0", 0), ("7", 7), ("86400", 86400), ("86401", 86400), ("9" * 5000, 86400)),
        *((each, None) for each in ("", "-1", "1.5", "soon", "Mon, 99 Foo 2026 00:00:00 GMT", "1e3", "0x10", "\u0663")),
    ],
)
async def test_retry_after_in_seconds_is_understood_and_capped(
    receiver: WebhookReceiver, header: str, seconds: float | None
) -> None:
    assert await retry_after(receiver, header) == seconds


@pytest.mark.parametrize(
    ("ahead", "least", "most"),
    [(timedelta(hours=1), 3000, 3600), (timedelta(days=9), 86400, 86400), (timedelta(hours=-1), 0, 0)],
)
async def test_retry_after_as_a_date_is_understood_and_capped(
    receiver: WebhookReceiver, ahead: timedelta, least: float, most: float
) -> None:
    seconds = await retry_after(receiver, format_datetime(datetime.now(UTC) + ahead, usegmt=True))
    assert seconds is not None
    assert least <= seconds <= most


async def test_a_body_that_fits_leaves_the_connection_for_the_next_post(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        for size in (0, 1, MOST_OF_ANSWER):
            answer = await post(client, receiver.url(f"/status/200?body={size}"))
            assert answer.body == b"x" * size
        assert [request.connection for request in receiver.requests] == [0, 0, 0]
        answer = await post(client, receiver.url(f"/status/200?body={MOST_OF_ANSWER + 1}"))
        assert answer.body == b"x" * MOST_OF_ANSWER
        await until(lambda: receiver.open == 0, "the connection with the rest of the body is closed")
        await post(client, receiver.url())
    assert [request.connection for request in receiver.requests] == [0, 0, 0, 0, 1]


async def test_an_endpoint_that_left_a_kept_connection_gets_the_post_on_a_new_one(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        for _ in range(3):
            assert (await post(client, receiver.url("/leave"))).status == 200
        # It leaves only when the next request is already on its way: the race that no look at the socket can avoid.
        for _ in range(3):
            assert (await post(client, receiver.url("/late"))).status == 200
    assert [request.path for request in receiver.requests] == ["/leave"] * 3 + ["/late"] * 5


async def test_connections_that_an_endpoint_has_no_use_for_are_closed_by_the_next_post(
    receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.webhooks.client._IDLE", 0.0)
    with WebhookReceiver() as other:
        async with client_of() as webhooks:
            assert (await post(webhooks, receiver.url())).status == 200
            assert (await post(webhooks, other.url())).status == 200
            await until(lambda: receiver.open == 0, "the idle connection is closed")


async def test_several_kept_connections_that_all_ended_are_no_failure(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        answers = await asyncio.gather(*(post(client, receiver.url("/late")) for _ in range(5)))
        assert [answer.status for answer in answers] == [200] * 5
        assert (await post(client, receiver.url("/late"))).status == 200


async def test_a_new_connection_that_ends_is_not_tried_again(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        answer = await post(client, receiver.url("/close"))
        assert answer.error == "the connection was closed without an answer"
        answer = await post(client, receiver.url("/reset"))
        assert "reset" in answer.error
    assert len(receiver.requests) == 2


async def test_an_answer_that_was_begun_on_a_kept_connection_is_not_asked_for_again(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        await post(client, receiver.url())
        answer = await post(client, receiver.url(f"/raw?hex={b'HTTP/1.1 200 O'.hex()}"))
        assert answer.status is None
    assert len(receiver.requests) == 2


# What takes its time, or more


@pytest.mark.parametrize("path", ["/hang", "/drip-headers"])
async def test_an_answer_that_does_not_come_in_time_is_an_error(receiver: WebhookReceiver, path: str) -> None:
    async with client_of(timeout=SHORT) as client:
        begun = time.monotonic()
        answer = await post(client, receiver.url(path))
        assert (answer.status, answer.error, answer.refused) == (None, "timed out after 0.4 s", False)
        assert SHORT <= answer.duration <= time.monotonic() - begun < SHORT + MARGIN
        await until(lambda: receiver.open == 0, "the connection is closed")


async def test_a_body_that_drips_gets_no_more_time_and_its_status_counts(receiver: WebhookReceiver) -> None:
    async with client_of(timeout=SHORT) as client:
        answer = await post(client, receiver.url("/drip"))
        assert (answer.status, answer.error) == (200, "")
        assert 0 < len(answer.body) < 100
        assert SHORT <= answer.duration < SHORT + MARGIN
        await until(lambda: receiver.open == 0, "the connection is closed")


async def test_a_body_that_is_cut_off_keeps_its_status(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        answer = await post(client, receiver.url("/cut"))
    assert (answer.status, answer.body, answer.error) == (200, b"x" * 10, "")


@pytest.mark.parametrize("path", ["/endless", "/huge", "/chunks", "/headers", "/interim"])
async def test_what_never_ends_is_left_early_and_memory_stays_flat(receiver: WebhookReceiver, path: str) -> None:
    async with client_of() as client:
        await post(client, receiver.url(path))
        tracemalloc.start()
        try:
            answers = [await post(client, receiver.url(path)) for _ in range(5)]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await until(lambda: receiver.open == 0, "the connections are closed")
    assert peak < 4_000_000
    for answer in answers:
        assert len(answer.body) <= MOST_OF_ANSWER
        assert answer.duration < MARGIN  # by its size, long before its time
        if path in ("/headers", "/interim"):
            assert answer.status is None
            assert "not HTTP/1.1" in answer.error
        else:
            assert answer.status == 200


async def test_what_is_not_http_is_an_error(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        answer = await post(client, receiver.url("/garbage"))
        assert answer.error.startswith("the answer is not HTTP/1.1: ")
        switched = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\n\r\n".hex()
        assert "not HTTP/1.1" in (await post(client, receiver.url(f"/raw?hex={switched}"))).error


PIECES = [
    *(b"HTTP/1.1 200 OK", b"HTTP/1.0 200", b"HTTP/1.1 100 C", b"\r\n", b"\r\n\r\n", b"\0", b": a"),
    *(b"Content-Length: 3", b"Content-Length: -1", b"Content-Length: " + b"9" * 30, b"Retry-After: \xff"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Connection: close"),
    *(b"3\r\nabc\r\n", b"0\r\n\r\n", b"ffffffffff\r\n"),
]


@given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_an_answer_or_an_error(receiver: WebhookReceiver, answer: bytes) -> None:
    async def ask() -> Answer:
        async with client_of() as client:
            return await post(client, receiver.url(f"/raw?hex={answer.hex()}"))

    found = asyncio.run(ask())
    assert (found.status is None) == (found.error != "")


async def test_cancellation_passes_through_and_closes_the_connection(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        for path in ("/hang", "/drip"):
            task = asyncio.create_task(post(client, receiver.url(path)))
            await until(lambda path=path: any(each.path == path for each in receiver.requests))  # type: ignore[misc]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: receiver.open == 0, "the connection is closed")
        assert (await post(client, receiver.url())).status == 200


async def test_waiting_for_a_free_connection_takes_none_of_a_posts_time(receiver: WebhookReceiver) -> None:
    async with client_of(timeout=SHORT, connections=1) as client:
        answers = await asyncio.gather(
            *(post(client, receiver.url(path)) for path in ("/hang", "/hang", "/status/200"))
        )
    assert [answer.status for answer in answers] == [None, None, 200]
    assert answers[2].duration < SHORT
    assert receiver.requests[2].at - receiver.requests[0].at >= SHORT


async def test_connections_are_bounded_and_none_is_lost_by_failures(receiver: WebhookReceiver) -> None:
    paths = ["/status/200", "/close", "/hang", "/garbage", "/huge", "/reset", "/leave", "/drip"]
    async with client_of(timeout=SHORT, connections=8) as client:
        await asyncio.gather(*(post(client, receiver.url(path)) for path in paths * 10))
        assert receiver.open <= 8
        begun = time.monotonic()
        answers = await asyncio.gather(*(post(client, receiver.url()) for _ in range(8)))
        assert [answer.status for answer in answers] == [200] * 8
        assert time.monotonic() - begun < SHORT + MARGIN
    await until(lambda: receiver.open == 0, "closing the client closes every connection")


# TLS


async def test_tls_is_verified_for_names_and_addresses(secure: WebhookReceiver, certificate: Certificate) -> None:
    async with client_of(ca_file=certificate.file, resolve=names("127.0.0.1")) as client:
        for host in (NAME, None):
            for _ in range(2):
                assert (await post(client, secure.url("/status/200", host))).status == 200
    assert [request.connection for request in secure.requests] == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["expired", "self-signed", "another name"])
async def test_a_certificate_that_does_not_fit_ends_the_attempt(
    tmp_path: Path, certificate: Certificate, kind: str
) -> None:
    if kind == "expired":
        shown = self_signed(tmp_path, name=f"DNS:{NAME}", expired=True)
        trusted, error = shown, "TLS: certificate has expired"
    elif kind == "self-signed":
        shown = self_signed(tmp_path, name=f"DNS:{NAME}")
        trusted, error = certificate, "TLS: self-signed certificate"
    else:
        shown = self_signed(tmp_path, name="DNS:other.example.com")
        trusted, error = shown, f"TLS: Hostname mismatch, certificate is not valid for '{NAME}'."
    with WebhookReceiver(certificate=shown) as receiver:
        async with client_of(ca_file=trusted.file, resolve=names("127.0.0.1")) as client:
            answer = await post(client, receiver.url(host=NAME))
        assert (answer.status, answer.error, answer.refused) == (None, error, False)
        assert receiver.requests == []


async def test_an_endpoint_without_tls_gets_nothing_by_https(receiver: WebhookReceiver) -> None:
    async with client_of() as client:
        answer = await post(client, receiver.url("/status/200").replace("http:", "https:"))
    assert answer.status is None
    assert receiver.requests == []


async def test_a_handshake_that_never_ends_is_cut_off_and_closed() -> None:
    with WebhookReceiver(no_handshake=True) as receiver:
        async with client_of(timeout=SHORT) as client:
            answer = await post(client, receiver.url().replace("http:", "https:"))
            assert answer.error == "timed out after 0.4 s"
            await until(lambda: receiver.open == 0, "the connection is closed")


@pytest.mark.parametrize("path", ["/hang", "/endless", "/headers", "/interim", "/cut", "/close", "/leave", "/late"])
async def test_with_tls_as_without(secure: WebhookReceiver, certificate: Certificate, path: str) -> None:
    async with client_of(timeout=2.0 if path != "/hang" else SHORT, ca_file=certificate.file) as client:
        for _ in range(2):
            answer = await post(client, secure.url(path))
            assert answer.status == (200 if path in ("/endless", "/cut", "/leave", "/late") else None), answer
            assert answer.error != "timed out after 2 s"
        if path != "/late":
            await until(lambda: secure.open == 0, "the connection is closed")


async def test_an_answer_that_breaks_in_its_middle_is_not_asked_for_again(
    secure: WebhookReceiver, certificate: Certificate
) -> None:
    async with client_of(ca_file=certificate.file) as client:
        assert (await post(client, secure.url())).status == 200
        answer = await post(client, secure.url("/broken-tls"))
    assert answer.error.startswith("TLS: ")
    assert len(secure.requests) == 2


async def test_nothing_is_left_for_the_garbage_collector(receiver: WebhookReceiver) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        async with client_of(timeout=SHORT) as client:
            for path in ("/hang", "/drip", "/close", "/garbage", "/huge", "/status/200"):
                await post(client, receiver.url(path))
            await post(client, receiver.url("/status/200").replace("http:", "https:"))
        await until(lambda: receiver.open == 0)
        gc.collect()
    assert [str(each.message) for each in caught if issubclass(each.category, ResourceWarning)] == []


# Proxies


@asynccontextmanager
async def proxied(login: str = "", **more: Any) -> AsyncIterator[tuple[HttpProxy, WebhookClient]]:
    async with HttpProxy() as proxy, client_of(proxy=f"http://{login}127.0.0.1:{proxy.port}", **more) as client:
        yield proxy, client


async def test_a_proxy_is_asked_for_the_checked_address_and_tls_is_with_the_name(
    secure: WebhookReceiver, certificate: Certificate
) -> None:
    script = names("8.8.8.8", then=["127.0.0.1"])
    async with proxied("u%40:p:w@", ca_file=certificate.file, allow=(), resolve=script) as (proxy, client):
        there = f"8.8.8.8:{secure.port}"
        proxy.leads[there] = ("127.0.0.1", secure.port)
        for _ in range(2):
            assert (await post(client, secure.url("/status/200", NAME))).status == 200
    ((method, target, headers),) = proxy.asked
    assert (method, target, headers["host"]) == ("CONNECT", there, there)
    assert headers["proxy-authorization"] == "Basic dUA6cDp3"  # u@ with p:w
    assert [request.headers["host"] for request in secure.requests] == [f"{NAME}:{secure.port}"] * 2
    assert "proxy-authorization" not in secure.requests[0].headers
    assert script.asked == [NAME]


async def test_two_names_at_one_address_share_no_connection_through_a_proxy(tmp_path: Path) -> None:
    # Else one name's certificate would stand for the other's.
    shown = self_signed(tmp_path, name=f"DNS:{NAME}")
    script = ScriptedNames({name: [["8.8.8.8"]] for name in (NAME, "other.example.com")})
    with WebhookReceiver(certificate=shown) as receiver:
        async with proxied(ca_file=shown.file, resolve=script) as (proxy, client):
            proxy.leads[f"8.8.8.8:{receiver.port}"] = ("127.0.0.1", receiver.port)
            assert (await post(client, receiver.url(host=NAME))).status == 200
            assert "Hostname mismatch" in (await post(client, receiver.url(host="other.example.com"))).error
        assert len(receiver.requests) == 1


async def test_through_a_proxy_inside_addresses_are_refused_before_it_is_asked() -> None:
    for resolves in (False, True):
        async with proxied(allow=(), resolve=names("8.8.8.8", "10.0.0.7"), proxy_resolves=resolves) as (proxy, client):
            hosts = ["127.0.0.1", "[::ffff:10.0.0.7]", "169.254.169.254", "localhost", "a.localhost", "127.1"]
            for host in hosts + ([] if resolves else [NAME]):
                for scheme in ("https", "http"):
                    answer = await post(client, f"{scheme}://{host}/")
                    assert answer.refused or "does not resolve" in answer.error
            assert proxy.asked == []


async def test_names_are_left_to_the_proxy_where_it_resolves(secure: WebhookReceiver, certificate: Certificate) -> None:
    script = ScriptedNames({})
    async with proxied(ca_file=certificate.file, resolve=script, proxy_resolves=True) as (proxy, client):
        proxy.leads[f"{NAME}:{secure.port}"] = ("127.0.0.1", secure.port)
        assert (await post(client, secure.url("/status/200", NAME))).status == 200
        answer = await post(client, f"http://{NAME}/")
        assert (answer.refused, "a name for the proxy" in answer.error) == (True, True)
    assert [target for _, target, _ in proxy.asked] == [f"{NAME}:{secure.port}"]
    assert script.asked == []


async def test_http_goes_through_a_proxy_as_a_whole_url_with_the_address(receiver: WebhookReceiver) -> None:
    async with proxied("u:p@", resolve=names("127.0.0.1")) as (proxy, client):
        for _ in range(2):
            assert (await post(client, receiver.url("/status/200?body=2", NAME))).body == b"xx"
    ((method, target, headers),) = proxy.asked
    assert (method, target) == ("POST", f"http://127.0.0.1:{receiver.port}/status/200?body=2")
    assert headers["host"] == f"{NAME}:{receiver.port}"
    assert headers["proxy-authorization"] == "Basic dTpw"


async def test_a_proxy_that_refuses_or_is_away_is_an_error_that_names_it() -> None:
    async with proxied("user:secret@", resolve=names("8.8.8.8")) as (proxy, client):
        at = f"127.0.0.1:{proxy.port}"
        proxy.status = 407
        assert (await post(client, f"https://{NAME}/")).error == f"the proxy {at} answered 407 to CONNECT"
        proxy.silent = True
        assert (await post(client, f"https://{NAME}/")).error == f"the proxy {at} did not answer CONNECT"
        assert "secret" not in repr(client)
        assert at.split(":")[1] in repr(client)
    async with client_of(proxy=f"http://user:secret@{at}", resolve=names("8.8.8.8")) as client:
        answer = await post(client, f"https://{NAME}/")
        assert (answer.error, answer.refused) == (f"the proxy {at} cannot be reached", False)


@pytest.mark.parametrize("proxy", ["https://u:secret@proxy:1", "proxy:1", "http://u:secret@proxy", "http://secret@p:0"])
async def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(proxy: str) -> None:
    with pytest.raises(ValueError, match="a proxy is given as") as refused:
        WebhookClient(timeout=1.0, proxy=proxy)
    assert "secret" not in str(refused.value)


async def test_settings_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no proxy that could resolve"):
        WebhookClient(timeout=1.0, proxy_resolves=True)
    with pytest.raises(ValueError, match="holds no certificates"):
        WebhookClient(timeout=1.0, ca_file=tmp_path / "missing.pem")
