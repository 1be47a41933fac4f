"""What a test reads of a daemon's log while the daemon writes it."""

from pathlib import Path

from tests.support.daemons import Daemon


def test_a_line_that_is_still_being_written_is_not_read_yet(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "")
    daemon.log.write_bytes(b'a warning\n{"action": "a"}\n{"action": "\xc3')
    assert daemon.lines() == [{"action": "a"}]
    daemon.log.write_bytes(b'a warning\n{"action": "a"}\n{"action": "\xc3\xa9"}\n')
    assert [line["action"] for line in daemon.lines()] == ["a", "é"]
