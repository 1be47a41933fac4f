"""`python -m workers` is `pgbridge-worker`."""

from workers.cli import main

main(prog_name="pgbridge-worker")
