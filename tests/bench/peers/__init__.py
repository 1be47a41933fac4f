"""Peers: programs that do the same job with other means. Each measures itself, excluding its start, and prints
`{"messages": int, "seconds": float}` on standard output; those that consume (`*_worker.py`) run until SIGTERM, and what
they have finished is read from their database. All but those that use this project's own packages run in
build/peers/, which install.py fills at pinned versions.
"""
