"""`python -m bridge` is `pgbridge`."""

from bridge.cli import main

main(prog_name="pgbridge")
