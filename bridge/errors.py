"""Every error that pgbridge raises on purpose.

    PgbridgeError
    ├── SettingsError        bridge.toml, the environment or a credential is wrong          exit 78
    ├── UnavailableError     a server does not answer; the same call may succeed later      exit 69
    │   ├── DatabaseUnavailableError
    │   │   └── ReadOnlyServerError   it answers, but takes no writes; a failover may mend it   exit 78
    │   └── BrokerUnavailableError
    ├── RefusedError         a server answers and says no; only a person can mend it        exit 1
    │   ├── SchemaError      the schema is missing, too old or too new                      exit 78
    │   ├── PrivilegeError   a role may not do what it must                                 exit 78
    │   ├── ListenError      LISTEN does not hear: a pooler or a standby stands in the way  exit 78
    │   └── TopologyError    the broker lacks, or has another, exchange, queue or stream    exit 78
    └── UsageError           a command was called with words it cannot act on               exit 2

Each message says what is wrong, where, and how to mend it, and never holds a secret. 78 (EX_CONFIG) tells systemd that
starting again cannot help.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class PgbridgeError(Exception):
    """Base of all of them. `exit_code` is what a command ends with."""

    exit_code = 1


class SettingsError(PgbridgeError):
    """The settings are wrong. One line a problem, each naming its key."""

    exit_code = 78


class UnavailableError(PgbridgeError):
    """A server does not answer."""

    exit_code = 69


class DatabaseUnavailableError(UnavailableError):
    """PostgreSQL does not answer, or ended the session."""


class ReadOnlyServerError(DatabaseUnavailableError):
    """PostgreSQL takes no writes: a standby, or a read-only role or database."""

    exit_code = 78


class BrokerUnavailableError(UnavailableError):
    """The broker does not answer, or closed the connection."""


class RefusedError(PgbridgeError):
    """A server says no."""


class SchemaError(RefusedError):
    """The schema `bridge` is missing, too old or too new for this version."""

    exit_code = 78


class PrivilegeError(RefusedError):
    """A role lacks a privilege."""

    exit_code = 78


class ListenError(RefusedError):
    """A NOTIFY of our own was not heard on the connection that listens."""

    exit_code = 78


class TopologyError(RefusedError):
    """The broker lacks what these settings need, or has it with other properties."""

    exit_code = 78


class UsageError(PgbridgeError):
    """A command was called with words it cannot act on."""

    exit_code = 2


@contextmanager
def about(key: str) -> Iterator[None]:
    """Puts the settings' key that an error is about before its message."""
    try:
        yield
    except PgbridgeError as error:
        if str(error).startswith(key):
            raise
        raise type(error)(f"{key}: {error}") from error
