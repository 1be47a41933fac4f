"""Every error that pgbridge raises on purpose, and the exit code that a command ends with.

    PgbridgeError                                                                          exit 1
    ├── UsageError           a command was called with words it cannot act on              exit 2
    ├── SettingsError        our settings, files or handlers must change                   exit 78
    ├── UnavailableError     a server does not answer, or not now                          exit 69
    │   ├── DatabaseUnavailableError
    │   │   ├── NoAnswerError         it has begun no answer, or stopped in the middle of one
    │   │   └── ReadOnlyServerError   it answers, but takes no writes: a failover may be on its way
    │   └── BrokerUnavailableError
    └── RefusedError         a server answers and says no                                  exit 69
        ├── LoginError       it does not take who we say that we are
        ├── PrivilegeError   a role or account may not do what it must
        ├── SchemaError      the schema `bridge` is missing, too old or too new, or cannot be there
        ├── ListenError      LISTEN does not hear: a pooler stands in the way
        └── TopologyError    the broker lacks an exchange, queue, stream, topic, or has it with other properties

78 (EX_CONFIG of sysexits.h) is kept for what no waiting can mend, so systemd does not start again. Everything that may
be mended elsewhere, on a server and by somebody else, ends with 69 (EX_UNAVAILABLE), and systemd starts again.

Each message says what is wrong, where (with the key of the setting that leads there), and how to mend it. None holds a
secret.
"""


class PgbridgeError(Exception):
    """Base of all of them. `exit_code` is what a command ends with."""

    exit_code = 1


class UsageError(PgbridgeError):
    """A command was called with words it cannot act on."""

    exit_code = 2


class SettingsError(PgbridgeError):
    """The settings, a file that they name, or a handler is wrong. One line a problem, each naming its key."""

    exit_code = 78


class UnavailableError(PgbridgeError):
    """A server does not answer; the same call may succeed later."""

    exit_code = 69


class DatabaseUnavailableError(UnavailableError):
    """PostgreSQL does not answer, or ended the session."""


class NoAnswerError(DatabaseUnavailableError):
    """PostgreSQL was silent for too long although the connection stood."""


class ReadOnlyServerError(DatabaseUnavailableError):
    """PostgreSQL takes no writes: a standby, or a read-only role or database."""


class BrokerUnavailableError(UnavailableError):
    """The broker does not answer, or ended the connection."""


class RefusedError(PgbridgeError):
    """A server answers and says no."""

    exit_code = 69


class LoginError(RefusedError):
    """A server does not take the user, the password, the certificate or the token."""


class PrivilegeError(RefusedError):
    """A role or account lacks a privilege."""


class SchemaError(RefusedError):
    """The schema `bridge` is missing, too old or too new for this version, or cannot be in this database."""


class ListenError(RefusedError):
    """A NOTIFY of our own was not heard on the connection that listens."""


class TopologyError(RefusedError):
    """The broker lacks what these settings need, or has it with other properties."""
