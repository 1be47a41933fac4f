"""Tests, on real servers: `unit/` needs none, `contract/` holds the suites of sinks and queues, `faults/` breaks things."""
