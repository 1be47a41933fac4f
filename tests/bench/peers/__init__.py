"""Peers: programs that do the same job with other means. Each measures itself, excluding its start, and prints
`{"messages": int, "seconds": float}` on standard output. All but those that use this project's own packages run in
build/peers/, which install.py fills at pinned versions.
"""
