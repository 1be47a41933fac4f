"""Certificates of the settings, as an SSL context."""

from ssl import SSLContext, create_default_context

from bridge.errors import SettingsError
from bridge.settings import TlsSettings


def tls_context(tls: TlsSettings) -> SSLContext:
    """For a client that checks the server's name. Raises SettingsError when a file cannot be read."""
    try:
        context = create_default_context(cafile=tls.ca_file)
    except OSError as error:
        raise SettingsError(f"tls.ca_file: {tls.ca_file} holds no certificates that can be read: {error}") from error
    if tls.cert_file is not None:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file)
        except OSError as error:
            raise SettingsError(
                f"tls.cert_file, tls.key_file: {tls.cert_file} and {tls.key_file} are no certificate with its "
                f"private key: {error}"
            ) from error
    return context
