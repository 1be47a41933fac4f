"""What it means when a connection to PostgreSQL does not come about.

libpq says why as text only, without a SQLSTATE. So this file alone matches texts, in the one table `_REASONS`:

- What libpq says by itself is English in every locale.
- What the server says has the form ``SEVERITY:  message``, with two spaces, in the server's language. In another
  language than English it is found in no row, and then that form shows that the server answered.
- A DSN with several hosts, or a host with several addresses, fails once for each; psycopg lists all of them.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import pq

from bridge.errors import (
    DatabaseUnavailableError,
    LoginError,
    PgbridgeError,
    PrivilegeError,
    ReadOnlyServerError,
    RefusedError,
    SettingsError,
)
from bridge.postgres.certificates import out_of_date


class _Reason(NamedTuple):
    pattern: str
    """A regular expression that is searched in libpq's text."""
    error: type[PgbridgeError]
    text: str
    """Our message: `{place}` is host:port, `{words}` the reason that libpq gives."""


_UNTRUSTED: Final = _Reason(
    r"certificate verify failed",
    RefusedError,
    "PostgreSQL at {place} shows a certificate that is not trusted. Name the certificate of its issuer in the DSN: "
    "sslrootcert=FILE",
)
_OUT_OF_DATE: Final = "PostgreSQL at {place} shows a certificate that is out of date: {words}. Renew it on the server"

_REASONS: Final = (
    # What the DSN itself holds.
    _Reason(
        r'invalid \S+ value: "|invalid "\S+" value: "|invalid integer value "|invalid port number: "|'
        r"could not match \d+ |weak sslmode|definition of service .* not found|service file .* not found|"
        r'unrecognized configuration parameter|invalid value for parameter|parameter "\S+" cannot be changed',
        SettingsError,
        "holds a parameter that is not right: {words}",
    ),
    _Reason(
        r"unsupported startup parameter",
        SettingsError,
        "the pooler at {place} does not take what is set at the start of a session: {words}. Remove `options` from the "
        "DSN, and PGOPTIONS from the environment; set it for the role, with ALTER ROLE ... SET",
    ),
    _Reason(
        r"root certificate file|not private key file|does not match private key|"
        r"could not (read|load|open) (certificate|private key)|private key file .* (has|must be)",
        SettingsError,
        "a file that the DSN names is not right: {words}",
    ),
    _Reason(
        r"session is not read-only|server is not in hot standby mode",
        SettingsError,
        "asks for a server that takes no writes, which cannot store the cursor; remove target_session_attrs ({words})",
    ),
    # TLS, and what is not PostgreSQL.
    _UNTRUSTED,
    _Reason(
        r"server certificate for .* does not match host name",
        RefusedError,
        "PostgreSQL at {place} shows the certificate of another host: {words}. Put the name that the certificate "
        "holds into the DSN, "
        "or give the server one for this name",
    ),
    _Reason(
        r"server does not support SSL",
        RefusedError,
        "PostgreSQL at {place} offers no TLS, which sslmode in the DSN requires. Set `ssl = on` on the server, or "
        "another sslmode",
    ),
    _Reason(
        r"invalid response to SSL negotiation|expected authentication request|SSL error: wrong version number|"
        r"SSL error: record layer failure",
        RefusedError,
        "what answers at {place} does not speak PostgreSQL's protocol: {words}. Correct the host or the port",
    ),
    _Reason(
        r"alert (unknown ca|(bad |expired )?certificate)",
        LoginError,
        "PostgreSQL at {place} does not take the certificate that the DSN names: {words}. Name one that is in date and "
        "that its authority has signed: sslcert=FILE sslkey=FILE",
    ),
    _Reason(r"SSL error: ", RefusedError, "the TLS handshake with PostgreSQL at {place} fails: {words}"),
    # Who we say that we are.
    _Reason(
        r"no password supplied",
        LoginError,
        "PostgreSQL at {place} asks for a password, and none is given. Put it into the DSN, or give the DSN as a "
        "file: dsn_file",
    ),
    _Reason(
        r"authentication failed",
        LoginError,
        "PostgreSQL at {place} refuses the login: {words}. Correct user and password in the DSN, or the role's "
        "password",
    ),
    _Reason(
        r"valid client certificate",
        LoginError,
        "PostgreSQL at {place} asks for a certificate of the client: {words}. Name one in the DSN: sslcert=FILE "
        "sslkey=FILE",
    ),
    _Reason(
        r"pg_hba\.conf",
        LoginError,
        "PostgreSQL at {place} refuses the login: {words}. Admit this user and address in the server's "
        "pg_hba.conf, or correct the DSN",
    ),
    _Reason(
        r'role "[^"]*" (does not exist|is not permitted to log in)',
        LoginError,
        "PostgreSQL at {place} refuses the login: {words}. Create the role with LOGIN, or correct the user in the DSN",
    ),
    # What the server does not have or does not allow.
    _Reason(
        r'database "[^"]*" does not exist|no such database',
        RefusedError,
        "PostgreSQL at {place} does not have this database: {words}. Create it, or correct the name in the DSN",
    ),
    _Reason(
        r"permission denied for database",
        PrivilegeError,
        "PostgreSQL at {place} refuses the connection: {words}. GRANT CONNECT ON DATABASE to this role",
    ),
    _Reason(
        r"session is read-only|server is in hot standby mode",
        ReadOnlyServerError,
        "PostgreSQL at {place} takes no writes: it is a hot standby, or default_transaction_read_only is on for "
        "this role or database. "
        "Point the DSN to the primary, or name all hosts in it",
    ),
    # What passes by itself.
    _Reason(r"is starting up", DatabaseUnavailableError, "PostgreSQL at {place} is starting: {words}"),
    _Reason(
        r"is shutting down|terminating connection due to administrator command",
        DatabaseUnavailableError,
        "PostgreSQL at {place} is shutting down: {words}",
    ),
    _Reason(
        r"in recovery mode|not yet accepting connections|database system is not accepting connections",
        DatabaseUnavailableError,
        "PostgreSQL at {place} is recovering and takes no connections yet: {words}",
    ),
    _Reason(
        r"too many clients|too many connections|connection slots are reserved|no more connections allowed",
        DatabaseUnavailableError,
        "PostgreSQL at {place} has no free connection slot: {words}. Raise max_connections, or the limit of this "
        "role or database",
    ),
    # Nothing answered.
    _Reason(
        r"failed to resolve host|could not translate host name|timeout expired|Connection refused|timed out|"
        r"No route to host|unreachable|No such file or directory|Connection reset by peer",
        DatabaseUnavailableError,
        "PostgreSQL at {place} does not answer: {words}",
    ),
    _Reason(
        r"closed the connection unexpectedly",
        DatabaseUnavailableError,
        "what listens at {place} ended the connection without an answer. If this lasts, look whether it is "
        "PostgreSQL, and correct the host or the port",
    ),
    # Anything else: from the server, which then answered; or from libpq.
    _Reason(r":  ", RefusedError, "PostgreSQL at {place} refuses the connection: {words}"),
    _Reason(r"", DatabaseUnavailableError, "no connection to PostgreSQL at {place}: {words}"),
)
"""The first row that is found in any attempt's text applies. So what a person must change goes before what passes."""


def connection_refused(error: psycopg.Error, parameters: Mapping[str, Any], key: str) -> PgbridgeError:
    """Our error for a connection that did not come about. `parameters` are libpq's, `key` names the setting."""
    text = str(error)
    reason = next(reason for reason in _REASONS if re.search(reason.pattern, text))
    place = address(parameters)
    if reason is _UNTRUSTED and (words := out_of_date(parameters)) is not None:
        return RefusedError(f"{key}: {_OUT_OF_DATE.format(place=place, words=words)}")
    return reason.error(f"{key}: {reason.text.format(place=place, words=_words(text))}")


def address(parameters: Mapping[str, Any]) -> str:
    """``db1:5432, db2:5432``: every host that these parameters of libpq, or its environment, name."""
    given = {option.keyword.decode(): option.val.decode() for option in pq.Conninfo.get_defaults() if option.val}
    given |= {name: str(value) for name, value in parameters.items()}
    hosts = (given.get("host") or given.get("hostaddr") or "").split(",")
    ports = given.get("port", "5432").split(",")
    if hosts == [""] and "service" in given:
        return f"the service {given['service']}"
    if len(ports) != len(hosts):
        ports = ports[:1] * len(hosts)
    return ", ".join(map(_one_address, hosts, ports))


def _one_address(host: str, port: str) -> str:
    if not host or host.startswith(("/", "@")):
        return f"the socket {host}/.s.PGSQL.{port}" if host else f"the local socket of port {port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_ATTEMPT: Final = re.compile(r"^- host: '?(.*?)'?, port: '?(.*?)'?, hostaddr: .*?: (?=connection|failed)", re.MULTILINE)
"""What psycopg writes before the text of each attempt, when there were several."""

_LABELS: Final = re.compile(
    r"^(connection (failed|is bad): )?(connection to server (at|on) .*? failed: )?(fe_sendauth: )?(\S+:  )?"
)
"""What begins a line and says no more than that it is about a connection, and how severe."""


def _words(text: str) -> str:
    """The reason alone, on one line; of several attempts each reason, with its host unless all are alike."""
    _, *parts = _ATTEMPT.split(text)
    if not parts:
        return _reason(text)
    attempts = [(f"{host}:{port}", _reason(said)) for host, port, said in zip(*[iter(parts)] * 3, strict=True)]
    reasons = dict.fromkeys(reason for _, reason in attempts)
    if len(reasons) == 1 or len({at for at, _ in attempts}) == 1:
        return "; ".join(reasons)
    return "; ".join(dict.fromkeys(f"{at} says: {reason}" for at, reason in attempts))


def _reason(text: str) -> str:
    # An indented line is a guess of libpq's at the cause.
    lines = [_LABELS.sub("", line).strip(" .") for line in text.splitlines() if not line.startswith("\t")]
    return "; ".join(dict.fromkeys(line for line in lines if line))
