"""The users of pgbridge on NATS, as a piece of the server's configuration.

They show who they are by NKeys, of which the server knows the public half only, so that the file holds no secret.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Final

from bridge.brokers.accounts import Accounts, Installation, Process
from bridge.brokers.nats.settings import EXAMPLE, parse_url
from bridge.brokers.nats.topology import dead_stream

_STREAM: Final = "events"
_ANSWERS: Final = "_INBOX.>"
"""Where the answers to requests arrive."""

_WHY: Final[dict[Process, str]] = {
    "bridge": "Publishes to the stream of events, and asks what it holds.",
    "workers": "Take and acknowledge what their consumers give, and store what they give up.",
    "operator": "Declares streams and consumers (`pgbridge topology --apply`), and tends dead letters.",
}


def accounts(installation: Installation) -> Accounts:
    """See `contract.Broker.accounts`."""
    if "@" in installation.place:
        raise ValueError(f"holds a user; leave that out, as in {EXAMPLE}: the users are about to be made")
    parse_url(installation.place)
    import nkeys

    seeds, users = {}, []
    for process in installation.processes:
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        seeds[process] = seed.decode()
        public = nkeys.from_seed(bytearray(seed)).public_key.decode()
        publish = ", ".join(map(json.dumps, _subjects(process, installation.workers)))
        users += [
            f"      # {installation.account(process)}. {_WHY[process]}",
            f"      {{ nkey: {public}, permissions: {{",
            f"          publish: [{publish}]",
            f"          subscribe: [{json.dumps(_ANSWERS)}] }} }}",
        ]
    account = re.sub(r"\W", "_", installation.bridge).upper()
    text = "\n".join(
        [
            f"# Written by `pgbridge init`: the users of {installation.bridge}. No secret. nats-server.conf says:",
            '#   include "pgbridge.conf"',
            "# If it has accounts, put this one among them. With accounts, nobody connects without a login.",
            "accounts {",
            f"  {account} {{",
            "    jetstream: enabled",
            "    users: [",
            *users,
            "    ]",
            "  }",
            "}",
            "",
        ]
    )
    return Accounts(
        settings={"url": installation.place, "stream": _STREAM},
        secrets={process: {"nkey": seed} for process, seed in seeds.items()},
        file="pgbridge.conf",
        text=text,
        how="beside nats-server.conf, which is to include it; then reload the server:\n     {file}",
        stays=True,
    )


def _subjects(process: Process, workers: Sequence[str]) -> list[str]:
    """What the user may publish to; with JetStream, requests are publishes."""
    match process:
        case "bridge":
            return [f"{_STREAM}.>", f"$JS.API.STREAM.INFO.{_STREAM}", "$JS.API.INFO"]
        case "workers":
            subjects = [f"$JS.API.STREAM.INFO.{_STREAM}"]
            for worker in workers:
                own = f"{_STREAM}.{worker}"
                subjects += [
                    f"$JS.API.CONSUMER.INFO.{own}",
                    f"$JS.API.CONSUMER.MSG.NEXT.{own}",
                    f"$JS.API.CONSUMER.UNPIN.{own}",
                    f"$JS.ACK.{own}.>",
                    f"$JS.API.STREAM.INFO.{dead_stream(worker)}",
                    f"{dead_stream(worker)}.>",
                ]
            return subjects
    streams = [_STREAM, *map(dead_stream, workers)]
    return ["$JS.API.INFO", "$JS.API.STREAM.>", "$JS.API.CONSUMER.>", *(f"{name}.>" for name in streams), "$JS.ACK.>"]
