"""What a daemon says at its `observe.listen` address."""

import asyncio
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

MEMORY = "process_resident_memory_bytes"


async def get(port: int, path: str) -> tuple[int, str]:
    """Status and body of one request to the daemon that listens at this port of the loopback address."""

    def look() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(look)


async def metric(port: int, name: str) -> float:
    """The value of a metric, over all its labels. Raises KeyError when there is none."""
    _, text = await get(port, "/metrics")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = [float(sample.value) for sample in samples if sample.name == name]
    if not values:
        raise KeyError(name)
    return sum(values)
