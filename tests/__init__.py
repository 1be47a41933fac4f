"""Tests, on real servers: `contract/` has the suites of sinks and queues, `faults/` breaks things."""
