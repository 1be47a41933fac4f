"""Certificates of the settings, as an SSL context."""

from collections.abc import Callable
from ssl import SSLContext, create_default_context

from bridge.errors import SettingsError
from bridge.settings import TlsSettings


def tls_context(tls: TlsSettings, key: Callable[[str], str]) -> SSLContext:
    """For a client that checks the server's name. `key` is that of the sink: `SinkSettings.key`.

    Reads the files each time, so that a new connection has renewed certificates. Raises SettingsError when they cannot
    be used.
    """
    try:
        context = create_default_context(cafile=tls.ca_file)
    except OSError as error:
        raise SettingsError(
            f"{key('tls.ca_file')}: {tls.ca_file} holds no certificates that can be read: {error}"
        ) from error
    if tls.cert_file is not None:
        try:
            # With a password given, an encrypted key is an error; without one, OpenSSL would ask on the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        except OSError as error:
            raise SettingsError(
                f"{key('tls.cert_file')}: {tls.cert_file} and {key('tls.key_file')} ({tls.key_file}) are not a "
                f"certificate and its unencrypted private key: {error}"
            ) from error
    elif tls.key_file is not None:
        raise SettingsError(f"{key('tls.key_file')}: is given without {key('tls.cert_file')}")
    return context
