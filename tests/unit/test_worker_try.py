"""`pgbridge-worker try`: what a handler does with a payload, and what a worker would make of it."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.environment import environment, make_environment

SETTINGS = """
name = "shop"
[postgres]
dsn = "postgresql://u:s3cret-dsn@nowhere.invalid/shop"
[sinks.events]
type = "memory"
[workers.odd]
handler = "odd:act"
path = "."
timeout = "300ms"
reply = "shop.acted"
retry_initial = "2s"
[workers.odd.options]
token = "s3cret-token"
"""

ODD = """
import asyncio, threading
from pydantic import BaseModel, SecretStr
from workers import Options, Reject, Retry, effect, handler

class Odd(Options):
    token: SecretStr

class Act(BaseModel):
    do: str = "nothing"

@handler("a.#", "a.b", payload=Act, options=Odd)
async def act(event, act, options):
    print("printed by the handler")
    async with effect("mail") as mail:
        if mail.result is None:
            mail.result = {"sent": (1, 2)}
    match act.do:
        case "reject": raise Reject("never")
        case "retry": raise Retry("later", after=30)
        case "fail": raise KeyError("missing")
        case "hang": await asyncio.Event().wait()
        case "bad": return {"a": {1}}
        case "see":
            seen = ("topic", "key", "headers", "source")
            return {name: getattr(event, name) for name in seen}
    async with effect("begun"):
        pass
    return {"do": act.do}

@handler("a.b")
def stuck(event):
    print("stuck", flush=True)
    threading.Event().wait()
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "bridge.toml").write_text(SETTINGS)
    (tmp_path / "odd.py").write_text(ODD)
    return tmp_path


class Trial:
    """`pgbridge-worker try odd - ...` in a project."""

    def __init__(self, programs: Path, project: Path) -> None:
        self.programs, self.project = programs, project

    def __call__(self, payload: object, *words: str, expect: int, **variables: str) -> subprocess.CompletedProcess[str]:
        text = payload if isinstance(payload, str) else json.dumps(payload)
        done = subprocess.run(
            ["pgbridge-worker", "try", "odd", "-", *words],
            input=text,
            cwd=self.project,
            env={**environment(self.programs), **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        assert "s3cret" not in done.stdout + done.stderr
        return done

    def json(self, payload: object, *words: str, expect: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self(payload, "--json", *words, expect=expect).stdout)
        return found


@pytest.fixture
def trial(programs: Path, project: Path) -> Trial:
    return Trial(programs, project)


def test_the_result_and_the_effects_of_a_handled_event_are_shown(trial: Trial) -> None:
    done = trial({}, expect=0)
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "printed by the handler",
        "handled: the worker calls shop.acted with the result, and acknowledges the event",
    ]
    assert "".join(lines[2:5]) == 'result: {  "do": "nothing"}'
    assert lines[5].startswith("effect mail, key odd:")
    assert lines[5].endswith(":mail: {")
    assert lines[-1].startswith("effect begun, key odd:")
    assert lines[-1].endswith(":begun: null")
    assert done.stderr == ""


def test_for_programs_there_is_nothing_but_json(trial: Trial) -> None:
    found = trial.json({}, expect=0)
    assert (found["outcome"], found["result"]) == ("handled", {"do": "nothing"})
    assert [(effect["operation"], effect["result"]) for effect in found["effects"]] == [
        ("mail", {"sent": [1, 2]}),
        ("begun", None),
    ]


@pytest.mark.parametrize(
    ("do", "outcome", "reason", "becomes"),
    [
        ("reject", "rejected", "never", "dead-letters the event at once, code rejected"),
        (1, "rejected", "payload.do: Input should be a valid string", "dead-letters the event at once, code rejected"),
        (
            "retry",
            "retry",
            "later",
            "tries the event again after 30 s, and after 8 attempts dead-letters it, code attempts",
        ),
        (
            "fail",
            "error",
            "KeyError: 'missing'",
            "tries the event again after about 2 s, and after 8 attempts dead-letters",
        ),
        (
            "hang",
            "timeout",
            "the handler ran longer than workers.odd.timeout, 0.3 s",
            "tries the event again after about",
        ),
        ("bad", "error", "ReplyError: the handler's result has no form in JSON", "tries the event again after about"),
    ],
)
def test_another_outcome_ends_with_1_and_says_what_becomes_of_the_event(
    trial: Trial, do: object, outcome: str, reason: str, becomes: str
) -> None:
    found = trial.json({"do": do}, expect=1)
    assert found["outcome"] == outcome
    assert found["reason"].startswith(reason)
    assert found["becomes"].startswith(becomes)
    assert found["result"] is None


def test_for_people_an_error_has_the_authors_own_frames_and_a_last_word(trial: Trial) -> None:
    lines = trial({"do": "fail"}, expect=1).stderr.splitlines()
    [raised] = [number for number, line in enumerate(ODD.splitlines(), 1) if "KeyError" in line]
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{trial.project / "odd.py"}", line {raised}, in act'
    assert lines[-2:] == [
        "pgbridge-worker: error: KeyError: 'missing'",
        "the worker tries the event again after about 2 s, and after 8 attempts dead-letters it, code error",
    ]


def test_the_event_has_what_the_options_say(trial: Trial) -> None:
    words = ("--topic", "a.c.d", "--key", "k", "--header", "x=1", "--header", "y=a=b")
    assert trial.json({"do": "see"}, *words, expect=0)["result"] == {
        "topic": "a.c.d",
        "key": "k",
        "headers": {"x": "1", "y": "a=b"},
        "source": "/try/shop",
    }
    assert trial.json({"do": "see"}, expect=0)["result"]["topic"] == "a.b"


@pytest.mark.parametrize(
    ("words", "variables", "expect", "said"),
    [
        (["--topic", "b"], {}, 2, "--topic: the worker subscribes to a.#, a.b, so it would never get 'b'"),
        (["--header", "x"], {}, 2, "--header 'x' is not of the form NAME=VALUE"),
        ([], {"PGBRIDGE_WORKERS__ODD__SUBSCRIBE": '["a.*"]'}, 2, "subscribes to a.*: name a topic with --topic"),
        (
            [],
            {"PGBRIDGE_WORKERS__ODD__OPTIONS__TOKEM": "x"},
            78,
            "workers.odd.options.tokem: unknown key; known: token",
        ),
        ([], {"PGBRIDGE_WORKERS__ODD__HANDLER": "odd:ack"}, 78, "workers.odd.handler: odd has no @handler named ack"),
        (["--config", "absent.toml"], {}, 78, "absent.toml: cannot be read"),
    ],
)
def test_mistakes_end_as_in_other_commands(
    trial: Trial, words: list[str], variables: dict[str, str], expect: int, said: str
) -> None:
    done = trial({}, *words, expect=expect, **variables)
    assert said in done.stderr
    assert done.stdout == ""


def test_an_unknown_worker_and_a_missing_file_are_mistakes_of_the_command_line(programs: Path, project: Path) -> None:
    for words, said in ((("evn", "-"), "there is no worker 'evn' in the settings; known: odd"), (("odd", "x"), "'x'")):
        done = subprocess.run(
            ["pgbridge-worker", "try", *words],
            cwd=project,
            env=environment(programs),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert said in done.stderr


def test_a_thread_that_does_not_end_is_said_and_ctrl_c_twice_ends_it(programs: Path, project: Path) -> None:
    with subprocess.Popen(
        ["pgbridge-worker", "try", "odd", "/dev/null"],
        cwd=project,
        env={
            **environment(programs),
            "PGBRIDGE_WORKERS__ODD__HANDLER": "odd:stuck",
            "PGBRIDGE_WORKERS__ODD__OPTIONS": "{}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "stuck\n"
        assert process.stderr.readline().startswith("The handler still runs after workers.odd.timeout, 0.3 s")
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        assert process.returncode == 130
