"""``[workers.<name>.options]`` of a worker whose handler is `workers.webhooks:fan_out`; nearly all is for `deliver`."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, IPvAnyNetwork, model_validator

from bridge.settings.models import Listen, Secret, SomeDuration
from workers.handler import Options

_SCHEDULE = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""Seconds from each failed attempt to the next, in all some three days, as Standard Webhooks has it."""


def _not_longer_than_a_minute(value: float) -> float:
    if value > 60:
        raise ValueError("is longer than 60s; an endpoint that thinks so long should answer first")
    return value


class WebhookOptions(Options):
    """How webhooks are sent."""

    timeout: Annotated[SomeDuration, AfterValidator(_not_longer_than_a_minute)] = 15.0
    """How long one request may take, from the look-up of the name to the end of the answer."""
    concurrency: int = Field(256, ge=1, le=10_000)
    """Most requests at once in one process; each endpoint has a limit of its own, over all processes."""
    schedule: list[SomeDuration] = Field(default_factory=lambda: list(_SCHEDULE), max_length=100)
    """How long after each failed attempt the next one follows, give or take a tenth. After the last there is none, and
    the delivery has failed."""
    keep: SomeDuration = 30 * 86400.0
    """How long deliveries that are finished, and what they were, can be looked at and sent again."""
    allow: list[IPvAnyNetwork] = Field(default_factory=list)
    """Networks that are not public and may be sent to all the same, as `["10.1.2.0/24"]`; also by http."""
    proxy: Secret | None = None
    """``http://[user:password@]host:port``, through which everything goes."""
    proxy_resolves: bool = False
    """Whether the proxy looks names up. It then has to refuse addresses that are not public: nobody else can."""
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""
    listen: Listen | None = None
    """`host:port` at which `deliver` serves `/metrics`, `/health`, `/livez` and `/readyz`; left out: nowhere."""

    @model_validator(mode="after")
    def _proxy_that_resolves(self) -> Self:
        if self.proxy_resolves and self.proxy is None:
            raise ValueError("proxy_resolves: there is no proxy; set proxy, or leave it out")
        return self
