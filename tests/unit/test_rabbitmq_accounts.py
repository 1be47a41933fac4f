"""The script that makes the accounts on RabbitMQ; tests/integration/test_init.py runs it."""

import re

from bridge.brokers.accounts import Installation
from bridge.brokers.rabbitmq.accounts import accounts


def test_passwords_are_given_to_rabbitmqctl_in_the_one_form_that_every_version_reads() -> None:
    script = accounts(Installation("shop", ["invoices"], "amqp://localhost/shop")).text
    # RabbitMQ 4 reads its standard input only after a command and a name, and no word more.
    assert re.findall(r"\| rabbitmqctl (.*) >", script) == ['"$verb" "$1"']
