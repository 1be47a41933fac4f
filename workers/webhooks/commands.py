"""`pgbridge-worker deliver`: runs one process that sends webhooks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from bridge.errors import SettingsError
from bridge.process.exposition import Labelled
from bridge.process.health import serving
from bridge.process.logs import configure
from bridge.process.tasks import run_daemon, stop_on_signals
from bridge.process.terminal import config_option, exit_codes
from bridge.settings import Settings, load
from workers.loading import load_options
from workers.webhooks.client import WebhookClient
from workers.webhooks.deliveries import Deliveries
from workers.webhooks.metrics import REGISTRY
from workers.webhooks.options import WebhookOptions
from workers.webhooks.sender import LEASE_BEYOND_TIMEOUT, Sender
from workers.webhooks.signature import sign


@click.command()
@click.argument("name")
@config_option
@exit_codes
def deliver(name: str, config: Path | None) -> None:
    """Sends the webhooks of the worker NAME until SIGTERM or SIGINT. Several may run side by side.

    The worker itself, `pgbridge-worker run NAME`, only stores what is to be sent.
    """
    settings = load(config, of="workers")
    configure(settings.observe)
    run_daemon(_deliver(name, settings, partial(load, config, of="workers")))


async def _deliver(name: str, settings: Settings, load_again: Callable[[], object]) -> None:
    options = load_options(settings, name, WebhookOptions)
    client = _client(name, options)
    deliveries = Deliveries(
        settings.workers_postgres, name, lease=options.timeout + LEASE_BEYOND_TIMEOUT, schedule=options.schedule
    )
    limit = settings.workers[name].shutdown_limit
    sender = Sender(name, options, deliveries, client, sign, shutdown_limit=limit)
    stop = stop_on_signals("webhook", load_again)
    served = Labelled(REGISTRY, bridge=settings.name, worker=name)
    try:
        with serving(f"workers.{name}.options.listen", options.listen, sender.health, served):
            await sender.run(stop)
    finally:
        await client.aclose()


def _client(name: str, options: WebhookOptions) -> WebhookClient:
    try:
        return WebhookClient(
            timeout=options.timeout,
            allow=options.allow,
            proxy=None if options.proxy is None else options.proxy.get_secret_value(),
            ca_file=options.ca_file,
            proxy_resolves=options.proxy_resolves,
            connections=options.concurrency,
        )
    except ValueError as error:
        raise SettingsError(f"workers.{name}.options: {error}") from error
