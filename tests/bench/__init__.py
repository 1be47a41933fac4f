"""The benchmark: pgbridge beside its peers, on real durable servers, as ratios taken in one run.

    python -m tests.bench [--quick] [--only ROW ...]

Read in this order: results.py (what a row is, and its arithmetic), world.py (servers and logs), bridge.py (the
daemon and how its rate is taken), then a theme: relay.py, brokers.py, sql.py, workers.py, ordered.py, latency.py,
scale.py, trouble.py. The peers are programs of their own in peers/, which measure themselves and print one JSON object,
but for those of workers.py, whose databases are watched.
"""
