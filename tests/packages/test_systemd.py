"""Bridge and workers under a real systemd: from the package to a PDF, and back from everything that befalls them.

A Debian 12 of its own with PostgreSQL and RabbitMQ, on a network of its own: `make deb-test`.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.packages.building import NEEDS, build
from tests.support.debian import Machine, kept
from tests.support.environment import ROOT

pytestmark = NEEDS

UNITS: Final = ("pgbridge", "pgbridge-worker@invoices", "pgbridge-worker@reorder")

PAGE: Final = ROOT / "docs" / "debian.md"
SESSION: Final = re.compile(r"(?<=<!-- session -->\n).*(?=<!-- /session -->\n)", flags=re.DOTALL)
"""What was typed on the page, and what came of it."""
MOST_LINES: Final = 40
"""Of one command's output on the page; of a longer one there are `FEW_LINES`."""
FEW_LINES: Final = 10

PLACE: Final = (
    """runuser -u postgres -- psql -qAt -d shop -c "select shop.place_order(gen_random_uuid(), 1, """
    """'[{{\\"sku\\": \\"{sku}\\", \\"quantity\\": {quantity}}}]')\""""
)
SCARCE: Final = PLACE.format(sku="CUP", quantity=90)
"""After this order few are left, which the shop says with plain pg_notify()."""
ORDER: Final = PLACE.format(sku="TEA-GREEN", quantity=1)

INSTALL: Final = (
    "apt-get install -qq /srv/pgbridge_*.deb > /dev/null",
    "pgbridge init --folder /etc/pgbridge --name shop --database postgresql://localhost/shop --broker rabbitmq "
    "--at amqp://localhost/shop --topic shop.invoice.requested --topic 'Low Stock' --listen 'Low Stock' "
    "--worker invoices --worker reorder=reorder:order_more",
    """\
cat > /etc/pgbridge/reorder.py <<END
from workers import Event, handler

@handler("Low Stock")
async def order_more(event: Event) -> None:
    print("order more:", event.json())
END""",
    "runuser -u postgres -- createdb shop",
    "runuser -u postgres -- psql -q -v ON_ERROR_STOP=1 -d shop < /etc/pgbridge/database.sql",
    "pgbridge migrate --credentials /etc/pgbridge/credentials/owner",
    "runuser -u postgres -- psql -q -o /dev/null -v ON_ERROR_STOP=1 -d shop "
    "-f /usr/share/doc/pgbridge/examples/shop.sql",
    "sh /etc/pgbridge/rabbitmq.sh",
    "pgbridge topology --apply --credentials /etc/pgbridge/credentials/operator",
    "mkdir -p /var/lib/pgbridge/invoices && chown pgbridge: /var/lib/pgbridge /var/lib/pgbridge/invoices",
    "pgbridge check",
    f"systemctl enable -q --now pgbridge.target {' '.join(UNITS)}",
    SCARCE,
)
RESULT: Final = (
    "systemctl --no-pager --plain --no-legend list-units 'pgbridge*'",
    "ls -l /var/lib/pgbridge/invoices",
    "runuser -u postgres -- psql -x -d shop -c 'select * from shop.invoices'",
    "journalctl --no-pager -o cat -u pgbridge-worker@reorder | grep 'order more'",
    "pgbridge status",
    "systemd-analyze security --no-pager | grep -E 'UNIT|pgbridge'",
)
"""What is to be seen once the order has become a PDF."""

SETTINGS: Final = "/etc/pgbridge/bridge.toml"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """One with the package, PostgreSQL and RabbitMQ, and nothing configured."""
    _, [package] = build("bookworm", ("1",))
    with Machine(kept("bookworm", "server", ["postgresql", "rabbitmq-server"]), own_network=True) as machine:
        shutil.copy(package, machine.path / "srv")
        machine.do("systemctl start postgresql rabbitmq-server")
        yield machine


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """By command, what it printed."""
    return {}


@pytest.fixture(scope="module")
def running(machine: Machine, said: dict[str, str]) -> Machine:
    """The installation, and an order on its way."""
    said |= {command: machine.do(command) for command in INSTALL}
    return machine


def wait(condition: Callable[[], bool], what: str, limit: float = 60.0) -> float:
    """Until it is so; the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + limit, what
        time.sleep(0.1)
    return time.monotonic() - began


def show(machine: Machine, unit: str, name: str) -> str:
    return machine.do(f"systemctl show -P {name} {unit}").strip()


def leads(machine: Machine) -> bool:
    return show(machine, "pgbridge", "StatusText") == "leading"


def invoices(machine: Machine) -> int:
    query = "select count(*) from shop.invoices where path is not null"
    return int(machine.do(f'runuser -u postgres -- psql -qAt -d shop -c "{query}"'))


def an_order_becomes_a_pdf(machine: Machine) -> None:
    before = invoices(machine)
    machine.do(ORDER)
    wait(lambda: invoices(machine) == before + 1, "the order has its invoice")


def test_from_the_package_to_a_pdf(running: Machine, said: dict[str, str]) -> None:
    for unit in UNITS:
        assert show(running, unit, "ActiveState") == "active"
    wait(lambda: invoices(running) == 1, "the order has its invoice")
    wait(lambda: "order more" in running.do("journalctl -u pgbridge-worker@reorder --no-pager"), "plain pg_notify came")
    said |= {command: running.do(command) for command in RESULT}
    assert re.search(r"\.pdf$", said[RESULT[1]], flags=re.MULTILINE)
    if os.environ.get("UPDATE_PAGES"):
        session = "".join(map(_shown, said.items()))
        PAGE.write_text(SESSION.sub(lambda _: session, PAGE.read_text()))
    shown = SESSION.search(PAGE.read_text())
    assert shown is not None
    for command in said:
        assert _shown((command, "")).rstrip() in shown[0]


def _shown(done: tuple[str, str]) -> str:
    command, output = done
    lines = output.strip().splitlines()
    if len(lines) > MOST_LINES:
        lines[FEW_LINES:] = [f"[... {len(lines) - FEW_LINES} more lines]"]
    first, *more = command.splitlines()
    return "".join(f"    {line}".rstrip() + "\n" for line in [f"# {first}", *more, *lines, ""])


def test_every_unit_is_exposed_to_2_at_most(running: Machine) -> None:
    for unit in (*UNITS, "pgbridge-console", "pgbridge-deliver@x", "pgbridge-listen@x", "pgbridge-reconcile@x"):
        said = running.do(f"systemd-analyze security --no-pager {unit} | tail -1")
        found = re.search(r"(\d+\.\d+)", said)
        assert found is not None, said
        assert float(found[1]) <= 2.0, said


def test_ready_is_said_when_it_leads(running: Machine) -> None:
    running.do("systemctl stop pgbridge")
    began = time.monotonic()
    running.do("systemctl start pgbridge")  # returns with READY=1
    print(f"start to READY: {time.monotonic() - began:.1f} s")
    wait(lambda: leads(running), "it leads")


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_killed_comes_back(running: Machine, unit: str) -> None:
    before = show(running, unit, "MainPID")
    running.do(f"kill -9 {before}")

    def is_back() -> bool:
        return show(running, unit, "ActiveState") == "active" and show(running, unit, "MainPID") not in ("0", before)

    print(f"{unit}: back {wait(is_back, 'it is back'):.1f} s after kill -9")
    an_order_becomes_a_pdf(running)


@pytest.mark.parametrize("unit", ["pgbridge", "pgbridge-worker@invoices"])
def test_the_watchdog_ends_a_process_that_is_frozen(running: Machine, unit: str) -> None:
    running.do(
        f"mkdir -p /run/systemd/system/{unit}.service.d; "
        f"printf '[Service]\\nWatchdogSec=3\\n' > /run/systemd/system/{unit}.service.d/watchdog.conf; "
        f"systemctl daemon-reload; systemctl restart {unit}"
    )
    before = show(running, unit, "MainPID")
    running.do(f"kill -STOP {before}")
    took = wait(lambda: show(running, unit, "MainPID") not in ("0", before), "another process takes its place")
    print(f"{unit}: another one {took:.1f} s after it was frozen, with WatchdogSec=3")
    an_order_becomes_a_pdf(running)
    running.do(f"rm -r /run/systemd/system/{unit}.service.d; systemctl daemon-reload; systemctl restart {unit}")


def test_a_stop_under_load_loses_nothing(running: Machine) -> None:
    before = invoices(running)
    load = f"for n in $(seq 30); do {ORDER} > /dev/null; done"
    running.do(f"({load}) & sleep 1; systemctl stop pgbridge.target; wait")
    for unit in UNITS:
        assert (show(running, unit, "ActiveState"), show(running, unit, "Result")) == ("inactive", "success")
    running.do("systemctl start pgbridge.target")
    wait(lambda: invoices(running) == before + 30, "every order has its invoice")


def test_a_reload_takes_new_settings_and_refuses_wrong_ones(running: Machine) -> None:
    before = show(running, "pgbridge", "MainPID")
    good = running.do(f"cat {SETTINGS}")
    running.do(f"sed -i 's/^name = .*/nmae = \"shop\"/' {SETTINGS}; systemctl reload pgbridge || true")
    wait(lambda: "did you mean name?" in running.do("journalctl -u pgbridge --no-pager -n 30"), "the mistake is told")
    assert show(running, "pgbridge", "MainPID") == before
    (running.path / SETTINGS[1:]).write_text(f'{good}\n[observe]\nlisten = "127.0.0.1:9187"\n')
    running.do("systemctl reload pgbridge")
    wait(lambda: running.run("bash", "-c", "< /dev/tcp/127.0.0.1/9187").returncode == 0, "it serves its health")
    assert show(running, "pgbridge", "MainPID") == before
    wait(lambda: leads(running), "it leads")
    (running.path / SETTINGS[1:]).write_text(good)
    running.do("systemctl reload pgbridge")
    wait(lambda: leads(running), "it leads")
    an_order_becomes_a_pdf(running)


def test_settings_that_are_wrong_stay_down_and_say_why(running: Machine) -> None:
    good = running.do(f"cat {SETTINGS}")
    running.do(f"sed -i 's/^name = .*/nmae = \"shop\"/' {SETTINGS}; systemctl restart pgbridge || true")
    wait(lambda: show(running, "pgbridge", "ActiveState") == "failed", "it stays down")
    status = running.run("systemctl", "status", "--no-pager", "pgbridge").stdout
    assert "status=78" in status
    assert "nmae: unknown key; did you mean name?" in status
    (running.path / SETTINGS[1:]).write_text(good)
    running.do("systemctl reset-failed pgbridge; systemctl start pgbridge")
    an_order_becomes_a_pdf(running)


def test_a_database_that_is_up_half_a_minute_after_us_is_waited_for(running: Machine) -> None:
    running.do("systemctl stop pgbridge.target postgresql@15-main; systemctl start --no-block pgbridge.target")
    wait(lambda: int(show(running, "pgbridge", "NRestarts")) >= 3, "it is tried again")
    time.sleep(30 - 3 * 6)
    running.do("systemctl start postgresql@15-main")
    took = wait(lambda: leads(running), "it leads")
    print(f"leads {took:.1f} s after the database is up")
    an_order_becomes_a_pdf(running)


def test_a_missing_folder_of_credentials_is_named(running: Machine) -> None:
    running.do("mv /etc/pgbridge/credentials/bridge /etc/pgbridge/credentials/away; systemctl restart pgbridge || true")
    wait(lambda: show(running, "pgbridge", "Result") == "exit-code", "it fails")
    status = running.run("systemctl", "status", "--no-pager", "pgbridge").stdout
    print(status)
    assert "243/CREDENTIALS" in status
    running.do("mv /etc/pgbridge/credentials/away /etc/pgbridge/credentials/bridge; systemctl restart pgbridge")
    an_order_becomes_a_pdf(running)
