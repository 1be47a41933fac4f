"""`python -m workers` is `pgbridge-worker`."""

from pgbridge import worker_main

worker_main()
