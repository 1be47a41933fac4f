"""A process' metrics as they are served: with labels that are the same for all of them, and so are written once."""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Labelled(Collector):
    """What another collector has, with these labels beside its own, which win.

    When a counter was made (``..._created``) is left out: Prometheus sees by the values that one began anew.
    """

    def __init__(self, collector: Collector, **labels: str) -> None:
        self._collector = collector
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for family in self._collector.collect():
            served = Metric(family.name, family.documentation, family.type, family.unit)
            served.samples = [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            yield served
