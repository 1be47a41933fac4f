"""Which sinks take a topic. Pure: patterns in, names of sinks out."""

from collections.abc import Sequence

from bridge.topics import matches

_CACHED_TOPICS = 65_536


class Routes:
    """The routing table; answers are kept per topic, since an application has few topics and many events."""

    def __init__(self, routes: Sequence[tuple[str, str]]) -> None:
        """`routes`: pairs of pattern and sink."""
        self._routes = tuple(routes)
        self._sinks_of: dict[str, tuple[str, ...]] = {}

    def sinks_of(self, topic: str) -> tuple[str, ...]:
        """The sinks of every route that matches, each once, in the order of the routes."""
        found = self._sinks_of.get(topic)
        if found is None:
            found = tuple(dict.fromkeys(sink for pattern, sink in self._routes if matches(pattern, topic)))
            if len(self._sinks_of) >= _CACHED_TOPICS:
                self._sinks_of.clear()
            self._sinks_of[topic] = found
        return found
