"""`python -m tests.console_pictures`: the pictures of docs/console.md, of a console over the demo while it runs."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import psycopg

from tests.support.chromium import Chromium
from tests.support.environment import ROOT

FOLDER: Final = ROOT / "docs" / "pictures"
WIDTH: Final = 1280
MOST_HEIGHT: Final = 1400
"""Pixels; what is below is left out."""

CHARTED: Final = 75.0
"""Seconds that the demo runs before, so that charts have something to show."""

RATES: Final = 2.5
"""Seconds from one look of the console to the next, and a little more: from two looks there are rates."""

TROUBLE: Final = """
select bridge.emit('shop.payment.requested', jsonb_build_object('payment', n, 'amount', 'a lot'), 'customer-' || n % 3)
  from generate_series(1, 12) n;
select bridge.emit('shop.invoice.requested', jsonb_build_object('number', n), 'customer-' || n % 3)
  from generate_series(1, 5) n;
select signing_secret is not null
  from bridge.add_endpoint('http://127.0.0.1:1/hooks', '{shop.order.placed}', 'a shop that moved');
"""
"""Requests that no worker can do, and an endpoint where nobody listens."""

PAGES: Final = {
    "flow": "/",
    "events": "/events",
    "event": "/events/{event}",
    "dead-letters": "/dead",
    "dead-plan": "/dead/plan?action=replay&worker=payments",
    "workers": "/workers",
    "worker": "/workers/payments",
    "webhooks": "/webhooks",
    "endpoint": "/webhooks/2",
    "bridges": "/bridges",
}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pgbridge-pictures-") as place:
        folder = Path(place)
        folder.chmod(0o755)
        words = ["-m", "bridge.cli", "demo", "--orders", "100000", "--rate", "10", "--keep", str(folder / "demo")]
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as demo:
            assert demo.stdout is not None
            base = next(line.split()[-1] for line in demo.stdout if "The console" in line)
            try:
                draw(base, folder / "demo")
            finally:
                demo.send_signal(signal.SIGINT)
                demo.stdout.read()


def draw(base: str, demo: Path) -> None:
    """Of each page, in the light and in the dark."""
    [dsn] = re.findall(r'^dsn = "(.*)"$', (demo / "bridge.toml").read_text(), flags=re.MULTILINE)[:1]
    with psycopg.connect(dsn.replace("shop_bridge@", "postgres@"), autocommit=True) as admin:
        admin.execute(TROUBLE.encode())
        time.sleep(CHARTED)
        [(event,)] = admin.execute(
            "select id from bridge.outbox where topic = 'shop.payment.requested' "
            "and created_at < now() - interval '20 s' order by id desc limit 1"
        ).fetchall()
    with closing(Chromium()) as browser:
        for name, path in PAGES.items():
            for scheme in ("light", "dark"):
                browser.look_like(WIDTH, scheme)
                browser.go(base + path.format(event=event)).sees("pgbridge")
                time.sleep(RATES)
                height = int(browser.ask("return document.documentElement.scrollHeight"))
                browser.look_like(WIDTH, scheme, height=min(height, MOST_HEIGHT))
                (FOLDER / f"console-{name}-{scheme}.png").write_bytes(browser.picture())


if __name__ == "__main__":
    main()
