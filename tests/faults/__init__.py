"""The fault suite: real servers under load, killed, frozen and cut at random times from a seed; losses are counted.

`python -m tests.faults` is the long form, `test_faults.py` a short one. In call order: `world` starts everything on one
of `brokers`, `load` commits events (`poison` among them), each with one of the `fates` that the workers' `handlers` act
out, and keeps the ledger; `audit` takes every message, `health` asks the workers, `kinds` are the faults, `run` plays
them, `outcomes` looks what became of every event at its workers, and `report` shows the result.
"""
