"""Which files hold secrets, and which of them everybody may read."""

from pathlib import Path

import pytest

from bridge.settings.secrecy import open_to_all


def found(folder: Path, text: str, *, mode: int = 0o644) -> list[str]:
    path = folder / "bridge.toml"
    path.write_text(text)
    path.chmod(mode)
    return [key for key, file in open_to_all(path, {})]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('postgres.dsn = "postgresql://u:p@h/d"', "postgres.dsn"),
        ('postgres.dsn = "host=h password=p"', "postgres.dsn"),
        ('postgres.dsn = "postgresql://u@h/d"', None),
        ('sinks.e.url = "amqp://bridge:p@mq/"', "sinks.e.url"),
        ('sinks.e.url = "nats://mq1,nats://u:p@mq2"', "sinks.e.url"),
        ('sinks.e.url = "nats://mq1,nats://t0ken@mq2"', "sinks.e.url"),
        ('sinks.e.url = "nats://mq1,nats://mq2"', None),
        ('sinks.e.url = "amqp://guest:guest@localhost/"', None),
        ('sinks.e.credentials = "{}"', "sinks.e.credentials"),
        ('workers.pay.options.api_key = "sk_live_1"', "workers.pay.options.api_key"),
        ('workers.pay.options.listen.secret = "whsec_1"', "workers.pay.options.listen.secret"),
        ('workers.dsn = ""', None),
    ],
)
def test_settings_hold_a_secret_where_a_value_is_one(tmp_path: Path, text: str, key: str | None) -> None:
    assert found(tmp_path, text) == ([] if key is None else [key])
    assert found(tmp_path, text, mode=0o640) == []


def test_the_files_that_settings_name_for_secrets_are_looked_at(tmp_path: Path) -> None:
    for name in ("dsn", "ca", "certificate", "key"):
        (tmp_path / name).touch(mode=0o644)
    text = f"""
postgres.dsn_file = "{tmp_path}/dsn"
sinks.e.tls = {{ ca_file = "{tmp_path}/ca", cert_file = "{tmp_path}/certificate", key_file = "{tmp_path}/key" }}
workers.pay.options.api_key_file = "{tmp_path}/none"
"""
    assert found(tmp_path, text) == ["postgres.dsn_file", "sinks.e.tls.key_file"]
    (tmp_path / "key").chmod(0o600)
    assert found(tmp_path, text) == ["postgres.dsn_file"]
