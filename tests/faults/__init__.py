"""The fault suite: real servers under load, killed, frozen and cut at random times from a seed; losses are counted.

`python -m tests.faults` is the long form, `test_faults.py` a short one. In call order: `world` starts everything on one
of `brokers`, `load` commits events (`poison` among them) and keeps the ledger, `audit` takes every message, `kinds` are
the faults, `run` plays them and `report` shows the result.
"""
