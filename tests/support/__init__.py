"""Servers that only tests need: Debian's PostgreSQL, and a proxy that breaks the wire."""
