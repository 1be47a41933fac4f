"""`python -m bridge` is `pgbridge`."""

from pgbridge import main

main()
