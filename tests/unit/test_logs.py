"""What a process logs on standard error: our lines, the libraries' and asyncio's, as JSON or text, with priorities."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONFIGURED = """
import asyncio, logging, warnings
import structlog
from bridge.process.logs import configure
from bridge.settings import ObserveSettings
configure(ObserveSettings(log_format={format!r}, log_level={level!r}))
log = structlog.get_logger()
"""


def said(code: str, folder: Path, *, format: str = "json", level: str = "info", journal: bool = False) -> list[str]:
    """The lines on standard error of a process that has set up its logs and runs the code; `journal` takes them."""
    with (folder / "stderr").open("w+b") as stderr:
        at = os.fstat(stderr.fileno())
        stream = f"{at.st_dev}:{at.st_ino}" if journal else f"{at.st_dev}:{at.st_ino + 1}"
        program = CONFIGURED.format(format=format, level=level) + code
        environment = {**os.environ, "JOURNAL_STREAM": stream}
        subprocess.run([sys.executable, "-c", program], stderr=stderr, env=environment, check=True, timeout=60)
        stderr.seek(0)
        return stderr.read().decode().splitlines()


def parsed(code: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said(code, folder, **options)]


OURS = """
log.debug("a.debug")
log.info("an.info", seconds=1.5)
log.warning("a.warning", reason="it is late")
log.error("an.error")
"""


def test_our_lines_are_json_with_an_action_a_level_and_a_time(tmp_path: Path) -> None:
    info, warning, error = parsed(OURS, tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", info.pop("timestamp"))
    assert info == {"action": "an.info", "level": "info", "seconds": 1.5}
    assert (warning["action"], warning["level"], warning["reason"]) == ("a.warning", "warning", "it is late")
    assert (error["action"], error["level"]) == ("an.error", "error")


def test_a_librarys_lines_are_json_too_and_name_their_logger(tmp_path: Path) -> None:
    code = """
logging.getLogger("somebodys.library").info("every request %s", 1)
logging.getLogger("somebodys.library").warning("the %s is late", "train")
warnings.warn("this goes away", DeprecationWarning)
"""
    late, deprecated = parsed(code, tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", late.pop("timestamp"))
    assert late == {
        "action": "library.message",
        "logger": "somebodys.library",
        "message": "the train is late",
        "level": "warning",
    }
    assert (deprecated["logger"], deprecated["level"]) == ("py.warnings", "warning")
    assert "this goes away" in deprecated["message"]


def test_libraries_say_nothing_below_the_level_that_the_settings_ask_for(tmp_path: Path) -> None:
    code = 'logging.getLogger("a").warning("late"); logging.getLogger("a").error("wrong"); log.warning("late")'
    assert [line["message"] for line in parsed(code, tmp_path, level="error")] == ["wrong"]


@pytest.mark.parametrize("library", ["aiormq.channel", "psycopg.pool", "nats.aio.client"])
def test_what_speaks_to_a_server_says_a_failure_in_one_line_without_a_trace(tmp_path: Path, library: str) -> None:
    code = f"""
logging.getLogger({library!r}).warning("error connecting, as at every attempt of an outage")
try:
    raise ConnectionResetError("reset by peer")
except OSError:
    logging.getLogger({library!r}).exception("reader failed")
"""
    (line,) = parsed(code, tmp_path)
    assert (line["logger"], line["message"], line["level"]) == (library, "reader failed", "error")
    assert line["reason"] == "ConnectionResetError: reset by peer"
    assert "exception" not in line


def test_what_a_task_raised_that_nobody_awaited_is_a_line_with_its_trace(tmp_path: Path) -> None:
    code = """
async def fail():
    raise ValueError("nobody awaits this")

async def main():
    asyncio.create_task(fail())
    await asyncio.sleep(0)

asyncio.run(main())
"""
    (line,) = parsed(code, tmp_path)
    assert (line["logger"], line["level"], line["action"]) == ("asyncio", "error", "library.message")
    assert "Task exception was never retrieved" in line["message"]
    assert line["exception"][0]["exc_value"] == "nobody awaits this"
    assert line["exception"][0]["frames"][-1]["name"] == "fail"


FAILS = """
def handle(payload):
    raise ValueError("no")

try:
    handle("s3cret" + str(len("payload")))
except ValueError as error:
    log.error("event.crashed", exc_info=error)
    logging.getLogger("somebodys.library").exception("crashed")
"""


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_trace_holds_no_values(tmp_path: Path, format: str) -> None:
    text = "\n".join(said(FAILS, tmp_path, format=format))
    assert text.count("handle") >= 2
    assert "s3cret7" not in text


def test_the_journal_gets_a_priority_before_each_json_line(tmp_path: Path) -> None:
    code = OURS + 'logging.getLogger("a.library").warning("late"); logging.getLogger("a").critical("gone")'
    lines = said(code, tmp_path, journal=True, level="debug")
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<4>", "<2>"]
    assert [json.loads(line[3:])["level"] for line in lines] == [
        "debug",
        "info",
        "warning",
        "error",
        "warning",
        "critical",
    ]


def test_the_journal_gets_a_priority_before_each_line_of_a_text_with_a_trace(tmp_path: Path) -> None:
    lines = said(FAILS + 'log.info("bridge.stopped")', tmp_path, format="text", journal=True)
    assert len(lines) > 10
    *traces, last = lines
    assert {line[:3] for line in traces} == {"<3>"}
    assert last.startswith("<6>")
    assert "\x1b" not in "".join(lines)
    assert any(line.endswith("ValueError: no") for line in traces)


@pytest.mark.parametrize("format", ["json", "text"])
def test_whoever_else_reads_gets_no_priorities(tmp_path: Path, format: str) -> None:
    assert not [line for line in said(OURS, tmp_path, format=format) if line.startswith("<")]


@pytest.mark.parametrize("stream", ["", "nonsense", "1:2:3"])
def test_a_journal_that_is_named_wrongly_is_not_used(tmp_path: Path, stream: str) -> None:
    with (tmp_path / "stderr").open("w+b") as stderr:
        program = CONFIGURED.format(format="json", level="info") + OURS
        environment = {**os.environ, "JOURNAL_STREAM": stream}
        subprocess.run([sys.executable, "-c", program], stderr=stderr, env=environment, check=True, timeout=60)
        stderr.seek(0)
        assert all(line.startswith(b"{") for line in stderr.read().splitlines())


def test_an_error_that_ends_a_command_has_a_priority_too(tmp_path: Path) -> None:
    (tmp_path / "bridge.toml").write_text("name = 1\nnmae = 2\n")
    with (tmp_path / "stderr").open("w+b") as stderr:
        at = os.fstat(stderr.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{at.st_dev}:{at.st_ino}"}
        command = [sys.executable, "-m", "bridge", "check", "--config", str(tmp_path / "bridge.toml")]
        done = subprocess.run(command, stderr=stderr, env=environment, check=False, timeout=60)
        stderr.seek(0)
        lines = stderr.read().decode().splitlines()
    assert done.returncode == 78
    assert len(lines) == 3
    assert all(line.startswith("<3>") for line in lines)


HOSTILE = """
hostile = "a\\x1b[2Jb\\x9b31m\\u202ec\\x07"
log.warning("event.dead_lettered", topic=hostile, reason="it has " + hostile, several=[hostile])
logging.getLogger("somebodys.library").warning("it says %s", hostile)
try:
    raise ValueError(hostile)
except ValueError as error:
    log.error("event.crashed", exc_info=error)
    logging.getLogger("somebodys.library").exception(hostile)
"""


@pytest.mark.parametrize("format", ["json", "text"])
def test_what_others_wrote_does_nothing_to_a_terminal(tmp_path: Path, format: str) -> None:
    lines = said(HOSTILE, tmp_path, format=format)
    assert all(line.replace("\t", "").isprintable() for line in lines)
    if format == "json":
        assert json.loads(lines[0])["topic"] == "a\x1b[2Jb\x9b31m\u202ec\x07"


def test_what_a_command_logs_holds_neither_values_nor_what_does_something_to_a_terminal(tmp_path: Path) -> None:
    program = (
        "import logging, structlog\nfrom bridge.process.logs import keep_off_output\nkeep_off_output()\n"
        f"log = structlog.get_logger()\n{FAILS}{HOSTILE}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    assert "event.dead_lettered" in done.stderr
    assert "s3cret7" not in done.stderr
    assert all(line.replace("\t", "").isprintable() for line in done.stderr.split("\n"))
