"""Brokers: one folder each, and in `contract.py` what all of them promise."""
