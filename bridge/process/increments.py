"""What metrics of this process have counted from one look to the next."""

from collections.abc import Iterable

from prometheus_client.metrics import MetricWrapperBase

Key = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name, and its labels with their values."""


def current(*metrics: MetricWrapperBase) -> dict[Key, float]:
    """What they say now."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in metrics
        for family in metric.collect()
        for sample in family.samples
    }


class Increments:
    """The increments of counters, and of histograms' buckets, since the last look; at first since this was made."""

    def __init__(self, metrics: Iterable[MetricWrapperBase]) -> None:
        self._metrics = tuple(metrics)
        self._before = current(*self._metrics)

    def take(self) -> dict[Key, float]:
        """By sample, for those that have grown. What it gives once, it does not give again."""
        now, before = current(*self._metrics), self._before
        self._before = now
        return {key: value - before.get(key, 0.0) for key, value in now.items() if value > before.get(key, 0.0)}
