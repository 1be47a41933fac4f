"""`pgbridge-worker listen`: Stripe's webhooks become events, once each.

A webhook is answered once its event is committed, so that Stripe brings again, for three days, whatever this process or
PostgreSQL lost. Who sends is known by the signature, and what came before by the id of Stripe's event.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import stripe
import structlog
from pydantic import BaseModel, ValidationError
from tenacity import wait_exponential_jitter

from bridge.errors import PgbridgeError, SettingsError
from bridge.process.asgi import AsgiServer, bound
from bridge.process.exposition import Labelled
from bridge.process.health import Health, serving
from bridge.process.logs import configure
from bridge.process.outage import Outage
from bridge.process.systemd import notify, watchdog_for_ever
from bridge.process.tasks import background, one_error, run_daemon, stop_on_signals
from bridge.process.terminal import config_option, exit_codes
from bridge.settings import Settings, load
from workers.handler import explain
from workers.loading import load_options
from workers.payments.metrics import DATABASE_UP, NOTICES, OUTCOMES, REGISTRY
from workers.payments.options import ListenOptions, PaymentOptions
from workers.pool import Pool

log = structlog.get_logger()

_LARGEST: Final = 1_000_000
"""Bytes of a webhook. Stripe's have some kilobytes."""

_READING: Final = 10.0
"""Seconds that a body may take to come."""

_TOLERANCE: Final = 300
"""Seconds that a signature is good for: Stripe's default."""

_CONNECTIONS: Final = 4
_LIMIT: Final = 5.0
"""Seconds that PostgreSQL may take for one. Stripe waits for some ten."""

_AT_ONCE: Final = 200
"""Requests; more are told to come back."""

_STOP_LIMIT: Final = 15
"""Seconds in which requests that are under way may end at a stop."""

_KEPT: Final = timedelta(days=35)
"""Stripe sends events of the last thirty days again, when somebody asks it to."""

_BEAT: Final = 2.0
_PRUNING: Final = 3600.0
"""Seconds between two looks whether PostgreSQL answers, and between two prunings."""

_RECEIVE: Final = "select bridge.receive_notice(%s, %s, %s, %s, %s)"
_PRUNE: Final = "select bridge.prune_notices(%s, %s)"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@click.command()
@click.argument("name")
@config_option
@exit_codes
def listen(name: str, config: Path | None) -> None:
    """Receives Stripe's webhooks for the worker NAME until SIGTERM or SIGINT, and records them as events."""
    settings = load(config, of="workers")
    configure(settings.observe)
    options = load_options(settings, name, PaymentOptions)
    if options.listen is None:
        raise SettingsError(
            f"workers.{name}.options.listen: is missing; it names the address that Stripe's webhooks come to, and the "
            "secret that they are signed with"
        )
    run_daemon(Listener(name, settings, options.listen).run(partial(load, config, of="workers")))


class Answer(NamedTuple):
    """What a request is told."""

    status: int
    what: str
    """For the people who read Stripe's dashboard."""


class Listener:
    """One process."""

    def __init__(self, name: str, settings: Settings, options: ListenOptions) -> None:
        self._name, self._options = name, options
        self._key = f"workers.{name}.options.listen"
        self._served = Labelled(REGISTRY, bridge=settings.name, worker=name)
        self._pool = Pool(settings.workers_postgres, f"pgbridge-listen {name}", size=_CONNECTIONS, limit=_LIMIT)
        self._database = Outage("postgres", wait_exponential_jitter(initial=0.2, max=5.0), worker=name)
        self._role = "starting"
        for outcome in OUTCOMES:
            NOTICES.labels(name, outcome)
        DATABASE_UP.labels(name).set_function(lambda: self._role == "running" and not self._database.lasts)

    async def run(self, load_again: Callable[[], object]) -> None:
        """Until the process is asked to stop; what is being recorded then is answered. Raises SettingsError and
        UnavailableError where it cannot listen, and what PostgreSQL refuses at the start."""
        stop = stop_on_signals("listener", load_again)
        server = AsgiServer(self, at_once=_AT_ONCE, stop_limit=_STOP_LIMIT)
        with (
            serving(f"{self._key}.health", self._options.health, self.health, self._served),
            bound(f"{self._key}.address", self._options.address, backlog=_AT_ONCE) as listening,
        ):
            await self._pool.open()
            try:
                await self._pool.value(_PRUNE, self._name, datetime.now(UTC) - _KEPT)  # it may, and the schema is there
                with one_error():
                    async with background(self._beat(), self._prune(), watchdog_for_ever()):
                        self._role = "running"
                        log.info("listener.started", worker=self._name, address=self._options.address)
                        notify("READY=1")
                        await server.serve_until(stop, listening, stopping=self._stopping)
            finally:
                await self._pool.close()
        log.info("listener.stopped", worker=self._name)

    def _stopping(self) -> None:
        self._role = "stopping"

    def health(self) -> Health:
        """What `/health` and `/readyz` say. Other threads may ask."""
        problem = self._database.problem
        unready = None if self._role == "running" else f"the process is {self._role}"
        return Health(self._name, self._role, () if problem is None else (problem,), unready=problem or unready)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application: one request."""
        answer = await self._answer(scope, receive)
        body = answer.what.encode() + b"\n"
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        if answer.status == 503:
            headers.append((b"retry-after", b"30"))
        if answer.status == 405:
            headers.append((b"allow", b"POST"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        if scope["method"] != "POST":
            return Answer(405, "webhooks are posted")
        try:
            async with asyncio.timeout(_READING):
                body = await _body(receive)
        except TimeoutError:
            return self._refused(408, "the body did not come in time")
        if body is None:
            return self._refused(413, f"a webhook has {_LARGEST} bytes at most")
        try:
            notice = read_notice(body, _header(scope, b"stripe-signature"), self._options)
        except ValueError as error:
            return self._refused(400, str(error))
        try:
            received = await self._pool.value(_RECEIVE, self._name, notice.id, notice.topic, notice.payload, notice.key)
        except PgbridgeError as error:
            self._database.lost(error)
            NOTICES.labels(self._name, "failed").inc()
            return Answer(503, "it could not be recorded; come again")
        self._database.restored()
        NOTICES.labels(self._name, "repeated" if received is None else "received").inc()
        log.debug("notice.received", worker=self._name, id=notice.id, topic=notice.topic, repeated=received is None)
        return Answer(200, "known" if received is None else "recorded")

    def _refused(self, status: int, why: str) -> Answer:
        NOTICES.labels(self._name, "refused").inc()
        log.warning("notice.refused", worker=self._name, reason=why)
        return Answer(status, why)

    async def _beat(self) -> None:
        """Knows whether PostgreSQL answers although nothing comes."""
        while True:
            await asyncio.sleep(_BEAT)
            await self._database.outlast(self._pool.value, "select 1")

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(_PRUNING)
            while await self._database.outlast(self._pool.value, _PRUNE, self._name, datetime.now(UTC) - _KEPT):
                pass


@dataclass(frozen=True, slots=True)
class Notice:
    """What a webhook says."""

    id: str
    topic: str
    payload: str
    """The body as it came."""
    key: str
    """The payment that it is about, so that its events keep their order; or whatever object it is about."""


class _Data(BaseModel):
    object: dict[str, Any]


class _StripeEvent(BaseModel):
    id: str
    type: str
    data: _Data


def read_notice(body: bytes, signature: str | None, options: ListenOptions) -> Notice:
    """Raises ValueError, with what is wrong, for one that Stripe did not sign with the secret in the last minutes, and
    for what is not an event."""
    try:
        payload = body.decode()
    except UnicodeDecodeError:
        raise ValueError("the body is not UTF-8") from None
    if signature is None:
        raise ValueError("there is no header Stripe-Signature")
    try:
        stripe.WebhookSignature.verify_header(payload, signature, options.secret.get_secret_value(), _TOLERANCE)
    except stripe.SignatureVerificationError as error:
        raise ValueError(f"the signature is not good: {error.user_message or error}") from None
    try:
        event = _StripeEvent.model_validate_json(payload)
    except ValidationError as error:
        raise ValueError(f"the body is signed, but is not an event: {explain(error, _StripeEvent)}") from None
    return Notice(event.id, f"{options.topic}.{event.type}", payload, _about(event.data.object) or event.id)


def _about(thing: Mapping[str, Any]) -> str:
    payment = thing.get("payment_intent")
    if isinstance(payment, dict):  # where the endpoint asks for it to be expanded
        payment = payment.get("id")
    return str(payment or thing.get("id") or "")


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def _body(receive: Receive) -> bytes | None:
    """None for one that is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _LARGEST:
            return None
        if not message.get("more_body", False):
            return bytes(body)
