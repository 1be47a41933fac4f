"""Serves until it is interrupted."""

import argparse
import signal

from workers.payments.fake.server import FakeStripe

parser = argparse.ArgumentParser(prog="python -m workers.payments.fake", description="A Stripe that moves no money.")
parser.add_argument("--port", type=int, default=12111, help="on 127.0.0.1 (default: 12111)")
parser.add_argument("--key", default="sk_test_fake", help="the API key that it takes (default: sk_test_fake)")
arguments = parser.parse_args()
fake = FakeStripe(arguments.port, secret_key=arguments.key)
print(f"{fake.url} takes the key {fake.secret_key}", flush=True)
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    fake.serve()
except KeyboardInterrupt:
    print("stopped", flush=True)
