"""The accounts of pgbridge on RabbitMQ, as commands for its administrator."""

import secrets
import shlex
from collections.abc import Sequence
from string import Template
from typing import Final

from bridge.brokers.accounts import Accounts, Installation, Process
from bridge.brokers.rabbitmq.settings import EXAMPLE, parse_url

_EXCHANGE: Final = "events"
_NOTHING: Final = "^$"
_DEFAULT_EXCHANGE: Final = r"^amq\.default$"
"""As permissions call the exchange that takes a message to the queue of its routing key: a retry, a dead letter."""

_SCRIPT: Final = Template("""\
#!/bin/sh
# Written by `pgbridge init`: the accounts of $bridge on RabbitMQ. Run it on a node of RabbitMQ, as root or as the user
# that it runs as. It may be run again. Delete it afterwards, since it holds passwords.
set -eu
vhost=$vhost

rabbitmqctl --quiet list_vhosts | grep -qxF -- "$$vhost" || rabbitmqctl --quiet add_vhost "$$vhost"

# Name, password, and what it may configure, write and read. Passwords go through a pipe: others see arguments.
account() {
  verb=add_user
  if rabbitmqctl --quiet list_users | cut -f1 | grep -qxF -- "$$1"; then verb=change_password; fi
  # No --quiet here: with any word more RabbitMQ 4 does not read what comes through the pipe, and waits for ever.
  printf '%s\\n' "$$2" | rabbitmqctl "$$verb" "$$1" > /dev/null
  rabbitmqctl --quiet set_permissions -p "$$vhost" "$$1" "$$3" "$$4" "$$5"
}

$accounts
""")


def accounts(installation: Installation) -> Accounts:
    """See `contract.Broker.accounts`."""
    scheme, _, rest = installation.place.partition("://")
    if "@" in rest:
        raise ValueError(f"holds a user; leave that out, as in {EXAMPLE}: the accounts are about to be made")
    passwords = {process: secrets.token_urlsafe(24) for process in installation.processes}
    urls = {
        process: f"{scheme}://{installation.account(process)}:{password}@{rest}"
        for process, password in passwords.items()
    }
    virtual_host = parse_url(urls["bridge"])[0].virtual_host
    lines = []
    for process, password in passwords.items():
        words = (installation.account(process), password, *_permissions(process, installation.workers))
        lines += [f"# {_WHY[process]}", " ".join(map(shlex.quote, ("account", *words)))]
    script = _SCRIPT.substitute(bridge=installation.bridge, vhost=shlex.quote(virtual_host), accounts="\n".join(lines))
    return Accounts(
        settings={"exchange": _EXCHANGE},
        secrets={process: {"url": url} for process, url in urls.items()},
        file="rabbitmq.sh",
        text=script,
        how="on a node of RabbitMQ, as root:\n     sh {file}",
    )


_WHY: Final[dict[Process, str]] = {
    "bridge": "Publishes to the exchange, and no more.",
    "workers": "Take from their queues; what is tried again or given up goes through the default exchange.",
    "operator": "Declares exchange and queues (`pgbridge topology --apply`), and tends dead letters.",
}


def _permissions(process: Process, workers: Sequence[str]) -> tuple[str, str, str]:
    """What the account may configure, write and read, as regular expressions over names."""
    match process:
        case "bridge":
            return _NOTHING, f"^{_EXCHANGE}$", _NOTHING
        case "workers":
            return _NOTHING, _DEFAULT_EXCHANGE, _belonging_to(workers)
    ours = _belonging_to([_EXCHANGE, *workers])
    return ours, f"{ours}|{_DEFAULT_EXCHANGE}", ours


def _belonging_to(names: Sequence[str]) -> str:
    """The names themselves, and all that begin with one and a dot, as a worker's further queues do."""
    return rf"^({'|'.join(names)})(\.|$)"
