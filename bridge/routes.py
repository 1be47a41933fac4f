"""Which sinks take a topic. Pure: patterns in, names of sinks out.

Patterns are AMQP's: words between dots, ``*`` for exactly one word, ``#`` for any number of words, none too.
"""

from collections.abc import Sequence

_CACHED_TOPICS = 65_536


def matches(pattern: str, topic: str) -> bool:
    """Whether the pattern takes the topic."""
    return _words_match(pattern.split("."), topic.split("."))


def _words_match(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    head, rest = pattern[0], pattern[1:]
    if head == "#":
        return any(_words_match(rest, words[taken:]) for taken in range(len(words) + 1))
    return bool(words) and head in ("*", words[0]) and _words_match(rest, words[1:])


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
