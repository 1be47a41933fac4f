"""The service accounts of pgbridge on Google Cloud, as commands for the project's administrator."""

import re
import shlex
from string import Template
from typing import Final

from bridge.brokers.accounts import SINK, Accounts, Installation, Process
from bridge.brokers.pubsub.settings import EXAMPLE

_TOPIC: Final = "events"

_SCRIPT: Final = Template("""\
#!/bin/sh
# Written by `pgbridge init`: the service accounts of $bridge in Google Cloud. Run it in this folder, with
# `gcloud` logged in as somebody who may administrate the project. The keys that it makes are secrets, and are stored
# in credentials/. Where the processes run on Google Cloud, give them the accounts instead, and leave the keys out.
set -eu
umask 077
project=$project

account() {
  gcloud iam service-accounts describe "$$1@$$project.iam.gserviceaccount.com" --project="$$project" > /dev/null 2>&1 ||
    gcloud iam service-accounts create "$$1" --project="$$project"
  [ -e "$$2" ] || gcloud iam service-accounts keys create "$$2" --iam-account="$$1@$$project.iam.gserviceaccount.com"
}
may() {  # on what, its name, who, the role
  gcloud pubsub "$$1" add-iam-policy-binding "$$2" --project="$$project" --role="$$4" \\
    --member="serviceAccount:$$3" > /dev/null
}

$created
# The operator declares topics and subscriptions.
gcloud projects add-iam-policy-binding "$$project" --condition=None --role=roles/pubsub.editor \\
  --member="serviceAccount:$operator@$$project.iam.gserviceaccount.com" > /dev/null
pgbridge topology --apply --config bridge.toml --credentials credentials/operator

number=$$(gcloud projects describe "$$project" --format='value(projectNumber)')
agent=service-$$number@gcp-sa-pubsub.iam.gserviceaccount.com
$granted
""")


def accounts(installation: Installation) -> Accounts:
    """See `contract.Broker.accounts`."""
    if not re.fullmatch(r"[a-z][a-z0-9.:-]{2,}", installation.place):
        raise ValueError(f"is not the id of a project of Google Cloud, as {EXAMPLE}")
    names = {process: _service_account(installation, process) for process in installation.processes}
    created = [f"account {name} credentials/{process}/sinks.{SINK}.credentials" for process, name in names.items()]
    bridge = f'"{names["bridge"]}@$project.iam.gserviceaccount.com"'
    granted = [f"may topics {_TOPIC} {bridge} roles/pubsub.publisher"]
    for worker in installation.workers:
        account, dead = f'"{names["workers"]}@$project.iam.gserviceaccount.com"', f"{worker}.dead"
        granted += [
            f"may subscriptions {worker} {account} roles/pubsub.subscriber",
            f"may topics {dead} {account} roles/pubsub.publisher",
            "# Pub/Sub itself moves what a worker does not settle.",
            f'may subscriptions {worker} "$agent" roles/pubsub.subscriber',
            f'may topics {dead} "$agent" roles/pubsub.publisher',
        ]
    text = _SCRIPT.substitute(
        bridge=installation.bridge,
        project=shlex.quote(installation.place),
        operator=names["operator"],
        created="\n".join(created),
        granted="\n".join(granted),
    )
    return Accounts(
        settings={"project": installation.place, "topic": _TOPIC},
        secrets={},
        file="pubsub.sh",
        text=text,
        how="where gcloud is, in the folder of the file:\n     sh {file}",
    )


def _service_account(installation: Installation, process: Process) -> str:
    """Google takes 6 to 30 small letters, digits and hyphens."""
    name = re.sub(r"[^a-z0-9-]", "-", installation.account(process))
    if len(name) > 30:
        raise ValueError(
            f"would get the service account {name!r}, and Google takes 30 characters; choose a shorter name"
        )
    return name
