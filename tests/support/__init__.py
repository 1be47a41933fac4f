"""Servers that only tests need: Debian's PostgreSQL 15, and a proxy that breaks the wire."""
