"""What a failure to connect is taken for, by the texts of libpq that a server here cannot be brought to say."""

import psycopg
import pytest

from bridge.errors import (
    DatabaseUnavailableError,
    LoginError,
    PgbridgeError,
    ReadOnlyServerError,
    RefusedError,
    SettingsError,
)
from bridge.postgres.refusals import address, connection_refused

AT = 'connection failed: connection to server at "10.0.0.1", port 5432 failed: '


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        (
            "FATAL:  the database system is starting up",
            DatabaseUnavailableError,
            "PostgreSQL at db:5432 is starting: the",
        ),
        ("FATAL:  the database system is shutting down", DatabaseUnavailableError, "is shutting down: the"),
        ("FATAL:  the database system is in recovery mode", DatabaseUnavailableError, "is recovering and takes no"),
        (
            "FATAL:  the database system is not yet accepting connections\nDETAIL:  Consistent recovery state has not "
            "been yet reached.",
            DatabaseUnavailableError,
            "takes no connections yet: the database system is not yet accepting connections; Consistent recovery state",
        ),
        ("FATAL:  sorry, too many clients already", DatabaseUnavailableError, "has no free connection slot: sorry"),
        ("FATAL:  remaining connection slots are reserved for roles", DatabaseUnavailableError, "no free connection"),
        ('FATAL:  too many connections for role "x"', DatabaseUnavailableError, "has no free connection slot"),
        ("session is read-only", ReadOnlyServerError, "takes no writes: it is a hot standby, or"),
        ("server is in hot standby mode", ReadOnlyServerError, "takes no writes"),
        (
            "SSL error: tlsv13 alert certificate required",
            LoginError,
            "does not take the certificate that the DSN names",
        ),
        ("SSL error: unsupported protocol", RefusedError, "the TLS handshake with PostgreSQL at db:5432 fails: SSL"),
        ('private key file "k" has group or world access', SettingsError, "a file that the DSN names is not right"),
        # In other languages.
        (
            "FATAL:  Passwort-Authentifizierung für Benutzer »x« fehlgeschlagen",
            RefusedError,
            "refuses the connection: Pa",
        ),
        ('致命的错误:  用户 "x" Password 认证失败', RefusedError, 'refuses the connection: 用户 "x" Password 认证失败'),
        # What no row knows, and the server has not said.
        ("something new", DatabaseUnavailableError, "no connection to PostgreSQL at db:5432: something new"),
        ("timeout expired", DatabaseUnavailableError, "PostgreSQL at db:5432 does not answer: timeout expired"),
        (
            "server closed the connection unexpectedly\n\tThis probably means the server terminated abnormally",
            DatabaseUnavailableError,
            "what listens at db:5432 ended the connection without an answer. If",
        ),
    ],
)
def test_a_text_has_its_error_and_its_words(text: str, kind: type[PgbridgeError], expected: str) -> None:
    error = connection_refused(psycopg.OperationalError(f"{AT}{text}"), {"host": "db"}, "postgres.dsn")
    assert type(error) is kind
    assert str(error).startswith("postgres.dsn: ")
    assert expected in str(error)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"host": "db", "port": "6432"}, "db:6432"),
        ({"host": "a,b"}, "a:5432, b:5432"),
        ({"host": "a,b", "port": "1,2"}, "a:1, b:2"),
        ({"host": "::1"}, "[::1]:5432"),
        ({"hostaddr": "10.0.0.1"}, "10.0.0.1:5432"),
        ({"host": "/run/postgresql"}, "the socket /run/postgresql/.s.PGSQL.5432"),
        ({"service": "shop"}, "the service shop"),
        ({}, "the local socket of port 5432"),
    ],
)
def test_every_host_has_its_address(parameters: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT", "PGHOSTADDR", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    assert address(parameters) == expected


def test_the_environment_of_libpq_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("PGPORT", "6000")
    assert address({}) == "elsewhere:6000"
