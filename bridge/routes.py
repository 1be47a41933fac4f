"""The routing table: which sinks take a topic, and which topics a sink's reader asks the log for.

A topic is matched twice, in Python for what comes from memory or goes to a replay, and in SQL for what is read from the
log, so that no message is made for a sink that does not take it. `bridge.topic_test` says in SQL what
`bridge.event.matches` says here; a test compares them on any pattern and topic.
"""

from collections.abc import Sequence
from typing import Final

from bridge.event import matches

_CACHED_TOPICS: Final = 65_536
"""Most topics that the table remembers an answer for."""


class Routes:
    """The table; answers are kept per topic, since an application has few topics and many events."""

    def __init__(self, routes: Sequence[tuple[str, str]]) -> None:
        """`routes`: pairs of pattern and sink."""
        self._routes = tuple(routes)
        self._sinks_of: dict[str, tuple[str, ...]] = {}

    @property
    def sinks(self) -> tuple[str, ...]:
        """Every sink that some route leads to, once."""
        return tuple(dict.fromkeys(sink for _, sink in self._routes))

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every pattern, once. What none of them takes has no route."""
        return tuple(dict.fromkeys(pattern for pattern, _ in self._routes))

    @property
    def take_all(self) -> bool:
        """Whether some route takes every topic."""
        return "#" in self.patterns

    def patterns_of(self, sink: str) -> tuple[str, ...]:
        """The patterns that lead to a sink, each once."""
        return tuple(dict.fromkeys(pattern for pattern, to in self._routes if to == sink))

    def sinks_of(self, topic: str) -> tuple[str, ...]:
        """The sinks of every route that matches, each once, in the order of the routes."""
        found = self._sinks_of.get(topic)
        if found is None:
            found = tuple(dict.fromkeys(sink for pattern, sink in self._routes if matches(pattern, topic)))
            if len(self._sinks_of) >= _CACHED_TOPICS:
                self._sinks_of.clear()
            self._sinks_of[topic] = found
        return found
