"""Patterns of topics, which routes and subscriptions share.

They are AMQP's: words between dots, ``*`` for exactly one word, ``#`` for any number of words, none too.
"""


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
