"""Certificates of the settings, as an SSL context, and what the errors of one mean."""

from collections.abc import Callable
from ssl import SSLCertVerificationError, SSLContext, SSLError, create_default_context
from typing import Final

from bridge.errors import SettingsError
from bridge.settings import TlsSettings

OTHER_NAME: Final = frozenset({62, 64})
"""OpenSSL's codes X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""

OUT_OF_DATE: Final = frozenset({9, 10})
"""OpenSSL's codes X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""

_NOT_AS_RFC_5280: Final = range(80, 94)
"""OpenSSL's codes for what it refuses only in its strict mode, X509_V_FLAG_X509_STRICT."""

_REFUSALS: Final = (
    "BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REQUIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "NO_CERTIFICATE",
    "UNKNOWN_CA",
    "UNSUPPORTED_CERTIFICATE",
)
"""End OpenSSL's names for the alerts by which a server refuses the certificate of a client."""


def refuses_ours(error: SSLError) -> bool:
    """Whether it is the server that does not take our certificate, or wants one."""
    return str(error.reason).endswith(_REFUSALS)


def trust_it(error: SSLCertVerificationError) -> str:
    """What to do about a certificate that is not trusted, though it is in date and for this host."""
    if error.verify_code in _NOT_AS_RFC_5280:
        return (
            "Python insists on RFC 5280 from version 3.13 on: issue the authority's certificate anew for its key, with "
            "keyUsage=critical,keyCertSign,cRLSign and what else docs/versions.md names"
        )
    return "Name the file of the authority that signed it"


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
    return context
