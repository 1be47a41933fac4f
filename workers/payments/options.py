"""``[workers.payments.options]``."""

from typing import Annotated

from pydantic import StringConstraints

from bridge.settings.models import Listen, Model, Secret, SomeDuration
from workers.handler import Options


class ListenOptions(Model):
    """``[workers.payments.options.listen]``: Stripe's webhooks, see `listen.py`."""

    address: Listen
    """``host:port`` that Stripe's webhooks come to. A proxy in front of it ends TLS, and has what Stripe is told."""
    secret: Secret
    """Of the endpoint, ``whsec_...``, as Stripe's dashboard shows it. While one is rolled, Stripe signs with both."""
    topic: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", max_length=100)] = "stripe"
    """What stands before the type of Stripe's event: ``stripe.payment_intent.succeeded``."""
    health: Listen | None = None
    """``host:port`` of `/health`, `/livez`, `/readyz` and `/metrics`."""


class PaymentOptions(Options):
    """``[workers.payments.options]``."""

    api_key: Secret
    """Stripe's secret or restricted key. A restricted one needs to write PaymentIntents and refunds."""
    api_base: Annotated[str, StringConstraints(pattern=r"^https?://[^/]+$")] = "https://api.stripe.com"
    """Where Stripe is; another one for tests."""
    timeout: SomeDuration = 20.0
    """Seconds that one call may take. Less than the worker's `timeout`, or an attempt ends in the middle of a call."""
    listen: ListenOptions | None = None
    """For `pgbridge-worker listen`."""
