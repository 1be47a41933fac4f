"""Every error that pgbridge raises on purpose.

    PgbridgeError
    ├── SettingsError        bridge.toml, the environment or a credential is wrong          exit 78
    ├── UnavailableError     a server does not answer; the same call may succeed later      exit 69
    │   ├── DatabaseUnavailableError
    │   └── BrokerUnavailableError
    ├── RefusedError         a server answers and says no; only a person can mend it        exit 1
    │   ├── SchemaError      the schema is missing, too old or too new
    │   ├── PrivilegeError   a role may not do what it must
    │   ├── ListenError      LISTEN does not hear: a pooler or a standby stands in the way
    │   └── TopologyError    the broker lacks, or has another, exchange, queue or stream
    └── UsageError           a command was called with words it cannot act on               exit 2

Each message says what is wrong, where, and how to mend it, and never holds a secret.
"""


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


class BrokerUnavailableError(UnavailableError):
    """The broker does not answer, or closed the connection."""


class RefusedError(PgbridgeError):
    """A server says no."""


class SchemaError(RefusedError):
    """The schema `bridge` is missing, too old or too new for this version."""


class PrivilegeError(RefusedError):
    """A role lacks a privilege."""


class ListenError(RefusedError):
    """A NOTIFY of our own was not heard on the connection that listens."""


class TopologyError(RefusedError):
    """The broker lacks what these settings need, or has it with other properties."""


class UsageError(PgbridgeError):
    """A command was called with words it cannot act on."""

    exit_code = 2
