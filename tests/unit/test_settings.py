"""Where settings come from, which of them wins, and that their pages tell the truth."""

import json
import tomllib
from pathlib import Path

import pytest

from bridge.errors import SettingsError
from bridge.settings import Settings, load
from bridge.settings.document import json_schema, settings_page
from bridge.settings.models import parse_duration, parse_rate, parse_size

FILE = """
name = "shop"
[postgres]
dsn = "postgresql://file"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bridge.toml"
    path.write_text(FILE)
    return path


def dsn(settings: Settings) -> str:
    return settings.postgres.dsn.get_secret_value()


def test_the_environment_wins_over_the_file_and_a_credential_over_both(file: Path, tmp_path: Path) -> None:
    assert dsn(load(file, {})) == "postgresql://file"
    environ = {"PGBRIDGE_POSTGRES__DSN": "postgresql://environment"}
    assert dsn(load(file, environ)) == "postgresql://environment"
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "postgres.dsn").write_text("postgresql://credential\n")
    (credentials / "unrelated").write_text("x")
    assert dsn(load(file, environ | {"CREDENTIALS_DIRECTORY": str(credentials)})) == "postgresql://credential"


def test_credentials_of_a_folder_have_its_name_before_their_own(file: Path, tmp_path: Path) -> None:
    """As systemd names what LoadCredential=bridge:/a/folder finds there."""
    (tmp_path / "bridge_postgres.dsn").write_text("postgresql://credential\n")
    assert dsn(load(file, {"CREDENTIALS_DIRECTORY": str(tmp_path)})) == "postgresql://credential"


def units_credential(file: Path, unit: str, text: str) -> Path:
    folder = file.parent / "credentials" / unit
    folder.mkdir(parents=True)
    (folder / "postgres.dsn").write_text(f"{text}\n")
    return folder


def test_a_command_outside_of_systemd_reads_the_credentials_of_the_units(file: Path) -> None:
    units_credential(file, "workers", "postgresql://workers")
    assert dsn(load(file, {})) == "postgresql://workers"
    units_credential(file, "bridge", "postgresql://bridge")
    assert dsn(load(file, {})) == "postgresql://bridge"
    assert dsn(load(file, {"PGBRIDGE_POSTGRES__DSN": "postgresql://environment"})) == "postgresql://environment"


def test_what_systemd_hands_over_is_all_that_a_unit_reads(file: Path, tmp_path: Path) -> None:
    units_credential(file, "bridge", "postgresql://bridge")
    (tmp_path / "handed").mkdir()
    assert dsn(load(file, {"CREDENTIALS_DIRECTORY": str(tmp_path / "handed")})) == "postgresql://file"


def test_credentials_that_this_user_may_not_read_are_named_where_something_is_missing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = units_credential(file, "bridge", "postgresql://bridge")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert dsn(load(file, {})) == "postgresql://file"
    file.write_text("nmae = 'shop'\n" + file.read_text())
    with pytest.raises(SettingsError, match=f"nmae.*\n.*{folder} holds is missing.*: use sudo, or --credentials"):
        load(file, {})


def test_a_secret_may_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("postgresql://from-file\n")
    path = tmp_path / "bridge.toml"
    path.write_text(FILE.replace('dsn = "postgresql://file"', f'dsn_file = "{tmp_path / "secret"}"'))
    assert dsn(load(path, {})) == "postgresql://from-file"


def test_lists_in_the_environment_are_written_as_in_toml(file: Path) -> None:
    settings = load(file, {"PGBRIDGE_CHANNELS__LISTEN": '["a", "Stock Level"]'})
    assert settings.channels is not None
    assert settings.channels.listen == ["a", "Stock Level"]


def test_a_secret_is_never_shown(file: Path) -> None:
    settings = load(file, {"PGBRIDGE_POSTGRES__DSN": "postgresql://u:hunter2@h"})
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


def test_the_variable_names_the_file(file: Path) -> None:
    assert load(None, {"PGBRIDGE_CONFIG": str(file)}).name == "shop"
    with pytest.raises(SettingsError, match="cannot be read"):
        load(None, {"PGBRIDGE_CONFIG": str(file) + "x"})


def test_no_schema_is_needed_only_for_channels_in_memory_without_an_outbox(file: Path) -> None:
    memory = {"PGBRIDGE_CHANNELS__LISTEN": '["a"]', "PGBRIDGE_CHANNELS__BUFFER": "memory"}
    assert load(file, {}).reads_outbox
    assert not load(file, memory).reads_outbox
    assert load(file, memory | {"PGBRIDGE_OUTBOX__RETENTION": "1d"}).reads_outbox


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("30s", 30), ("1.5m", 90), ("2h", 7200), ("7d", 604800), (3, 3)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5 parsecs", "-1s", -1, True, None])
def test_what_is_not_a_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a duration|is negative"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "size"), [("1kB", 1000), ("64MiB", 67108864), ("1.5MB", 1500000), (7, 7)])
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "times"), [("25/s", 25), ("120/m", 2), ("1/h", 1 / 3600), (" 5 / s ", 5), ("1000000/s", 1_000_000)]
)
def test_rates_are_times_a_second(text: str, times: float) -> None:
    assert parse_rate(text) == times


@pytest.mark.parametrize("text", ["", "25", 25, "25 a second", "1.5/s", "-1/s", "5/d", "/s", True, None])
def test_what_is_not_a_rate_is_refused_with_one_that_is(text: object) -> None:
    with pytest.raises(ValueError, match=r'is not a rate; write .* as in "25/s"'):
        parse_rate(text)


def test_the_pages_of_the_settings_are_the_ones_generated_from_the_models() -> None:
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "settings.md").read_text() == settings_page(), "run: make docs"
    assert (docs / "bridge.schema.json").read_text() == json_schema(), "run: make docs"


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert all(line.split("|")[-2].strip() for line in rows)


def test_the_schema_for_editors_knows_every_sink() -> None:
    kinds = json.loads(json_schema())["properties"]["sinks"]["additionalProperties"]["oneOf"]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert len(kinds) == len(project["entry-points"]["pgbridge.brokers"])


SINKS = {
    "rabbitmq": {"type": "rabbitmq", "url": "amqp://guest@h"},
    "nats": {"type": "nats", "url": "nats://h"},
    "pubsub": {"type": "pubsub", "project": "shop-1"},
    "memory": {"type": "memory"},
}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("postgres.connect_timeout", "0s", "must be more than zero"),
        ("outbox.poll_interval", "0s", "must be more than zero"),
        ("outbox.standby_interval", "0s", "must be more than zero"),
        ("outbox.heartbeat", "0s", "must be more than zero"),
        ("outbox.prune_interval", "0s", "must be more than zero"),
        ("outbox.page_bytes", "0B", "must be more than zero"),
        ("channels.heartbeat", "0s", "must be more than zero"),
        ("channels.standby_interval", "0s", "must be more than zero"),
        ("channels.listen", '[""]', "channels.listen.0: is empty"),
        ("channels.listen", f'["{"é" * 32}"]', "has 64 bytes; PostgreSQL takes channels of up to 63"),
        ("relay.bytes_in_flight", "0B", "must be more than zero"),
        ("relay.retry_initial", "0s", "must be more than zero"),
        ("relay.retry_max", "0s", "must be more than zero"),
        ("relay.retry_max", "50ms", "0.05 s is below retry_initial (0.1 s)"),
        ("sinks.rabbitmq.publish_timeout", "0s", "must be more than zero"),
        ("sinks.memory.publish_timeout", "0s", "must be more than zero"),
        ("sinks.rabbitmq.max_message_bytes", "0B", "must be more than zero"),
        ("sinks.rabbitmq.heartbeat", "0s", "must be more than zero"),
        ("sinks.rabbitmq.heartbeat", "1d", "is longer than 65535 s"),
        ("sinks.nats.max_message_bytes", "0B", "must be more than zero"),
        ("sinks.pubsub.max_message_bytes", "0B", "must be more than zero"),
        ("sinks.pubsub.max_message_bytes", "10MB", "less than or equal to 9800000"),
        ("sinks.pubsub.batch_messages", "1001", "less than or equal to 1000"),
        ("sinks.pubsub.batch_bytes", "11MB", "less than or equal to 10000000"),
        ("sinks.pubsub.batch_delay", "30s", "30 s is not below publish_timeout (30 s)"),
        ("observe.listen", "127.0.0.1:65536", "its port is not between 1 and 65535"),
        ("observe.listen", "127.0.0.1:0", "its port is not between 1 and 65535"),
        ("workers.w.listen", "localhost:70000", "its port is not between 1 and 65535"),
        ("workers.w.timeout", "0s", "must be more than zero"),
        ("workers.w.rate", "0/s", "is zero, at which nothing ever begins; leave it out"),
        ("workers.w.rate", "1000001/s", "is more than 1000000/s, the highest rate"),
        ("workers.w.rate", "25", 'is not a rate; write a whole number and a unit of time, as in "25/s"'),
        ("workers.w.retry_initial", "0s", "must be more than zero"),
        ("workers.w.retry_max", "500ms", "0.5 s is below retry_initial (1 s)"),
        ("workers.w.retry_max", "50d", "is longer than 49d, the longest that a broker keeps a retry waiting"),
        ("workers.w.retry_initial", "50d", "is longer than 49d"),
        ("workers.w.timeout", "20001d", "is longer than 20000d, which is the longest duration"),
        ("postgres.connect_timeout", "99999d", "is longer than 20000d"),
        ("outbox.retention", "999999999999d", "is longer than 20000d"),
        (
            "workers.w.on_dead_letter",
            "hold",
            'only an ordered worker can hold a key; set ordered = true, or say "pass"',
        ),
        ("workers.w.on_dead_letter", "wait", "should be 'pass' or 'hold'"),
        ("workers.w.prefetch", "3", "3 is below concurrency (4), which would never be reached"),
        ("workers.w.prefetch", "65536", "less than or equal to 65535"),
        ("workers.on_nats.prefetch", "10001", "10001 is above 10000, the most that a sink of type nats gives"),
        ("workers.on_pubsub.prefetch", "1001", "1001 is above 1000, the most that a sink of type pubsub gives"),
        ("workers.w.subscribe", '[""]', "workers.w.subscribe.0: String should have at least 1 character"),
        ("workers.w.subscribe", '["shop.order*"]', "'order*': * and # stand for whole words between dots"),
        ("workers.w.subscribe", '["shop.**"]', "'**': * and # stand for whole words"),
        ("workers.w.subscribe", '["a", "shop.>"]', "workers.w.subscribe.1: > is no wildcard; write # for any number"),
        ("workers.w.subscribe", f'["{"é" * 128}"]', "has 256 bytes; topics and patterns have up to 255"),
        ("workers.w.start", "beginning", "and memory does not. Leave it out"),
        ("workers.w.start", "yesterday", "'now' or 'beginning'"),
    ],
)
def test_what_can_never_work_is_refused_with_its_key(tmp_path: Path, key: str, value: str, expected: str) -> None:
    path = tmp_path / "bridge.toml"
    tables = [f"[sinks.{name}]\n" + "".join(f"{k} = '{v}'\n" for k, v in sink.items()) for name, sink in SINKS.items()]
    handler = "".join(
        f"[workers.{name}]\nhandler = 'a:b'\nsink = '{sink}'\n"
        for name, sink in (("w", "memory"), ("on_nats", "nats"), ("on_pubsub", "pubsub"))
    )
    path.write_text('name = "shop"\n[channels]\nlisten = ["a"]\n' + "".join(tables) + handler)
    load(path, {})
    with pytest.raises(SettingsError) as refused:
        load(path, {f"PGBRIDGE_{key.upper().replace('.', '__')}": value})
    line = str(refused.value).splitlines()[1]
    assert line.startswith(f"  {key}")
    assert expected in line


def test_most_that_a_broker_gives_is_allowed(file: Path) -> None:
    worker = {"PGBRIDGE_WORKERS__W__HANDLER": "a:b", "PGBRIDGE_WORKERS__W__PREFETCH": "10000"}
    nats = {"PGBRIDGE_SINKS__EVENTS__TYPE": "nats", "PGBRIDGE_SINKS__EVENTS__URL": "nats://h"}
    assert load(file, worker | nats).workers["w"].prefetch == 10_000


@pytest.mark.parametrize("pattern", ["#", "*", "shop.*.#", "Stock Level", "a>b.x", "é" * 127])
def test_a_pattern_that_topics_match_is_allowed(file: Path, pattern: str) -> None:
    worker = {"PGBRIDGE_WORKERS__W__HANDLER": "a:b", "PGBRIDGE_WORKERS__W__SUBSCRIBE": f'["{pattern}"]'}
    assert load(file, worker).workers["w"].subscribe == [pattern]


@pytest.mark.parametrize(
    ("sink", "mistakes"), [("nats", 0), ("rabbitmq", 1), ("pubsub", 1), ("memory", 1), ("unknown", 1)]
)
def test_a_worker_begins_with_the_history_only_where_the_broker_keeps_one(
    tmp_path: Path, sink: str, mistakes: int
) -> None:
    path = tmp_path / "bridge.toml"
    table = "".join(f"{k} = '{v}'\n" for k, v in SINKS.get(sink, {"type": "smtp"}).items())
    handler = "[workers.w]\nhandler = 'a:b'\nstart = 'beginning'\n"
    path.write_text(f'name = "shop"\n[sinks.events]\n{table}{handler}')
    if not mistakes:
        assert load(path, {}).workers["w"].start == "beginning"
        return
    with pytest.raises(SettingsError) as refused:
        load(path, {})
    (line,) = str(refused.value).splitlines()[1:]
    assert line.startswith("  sinks.events.type" if sink == "unknown" else "  workers.w.start")


@pytest.mark.parametrize(
    "key", ["outbox.retention", "relay.shutdown_limit", "sinks.pubsub.batch_delay", "workers.w.shutdown_limit"]
)
def test_zero_is_refused_only_where_it_cannot_work(file: Path, key: str) -> None:
    pubsub = {"PGBRIDGE_SINKS__PUBSUB__TYPE": "pubsub", "PGBRIDGE_SINKS__PUBSUB__PROJECT": "shop-1"}
    worker = {"PGBRIDGE_WORKERS__W__HANDLER": "a:b"}
    load(file, pubsub | worker | {f"PGBRIDGE_{key.upper().replace('.', '__')}": "0s"})


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_duration_is_finite(number: float) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(number)
