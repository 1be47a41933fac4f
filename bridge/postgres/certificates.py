"""What TLS proves of the server behind a connection, and what is wrong with a certificate that it shows."""

import os
import socket
import ssl
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import pq

from bridge.errors import SettingsError
from bridge.process.addresses import is_here

_SSL_REQUEST: Final = struct.pack("!ii", 8, 80_877_103)
"""How a client of PostgreSQL's protocol asks for TLS; the server answers S before the handshake."""

_LOOK_LIMIT: Final = 1.0
"""Seconds that each step of a look at one host may take."""

_OUT_OF_DATE: Final = (9, 10)
"""OpenSSL's codes for a certificate whose time has not come, or is over."""

_FILES: Final = {"sslrootcert": "root certificate file", "sslcert": "client certificate file"}
"""Parameters of libpq whose file it passes over where it does not exist: the first except with verify-ca and
verify-full, the second always."""


def require_files(given: Mapping[str, Any], key: str) -> None:
    """Raises SettingsError for a certificate that the DSN names and that is not there."""
    for parameter, what in _FILES.items():
        path = given.get(parameter)
        if path and path != "system" and not os.path.exists(path):
            raise SettingsError(f'{key}: the {what} "{path}" does not exist; correct {parameter} in the DSN')


def find_the_systems(given: Mapping[str, Any]) -> None:
    """Where the server's authority is to be one of the system's, tells libpq's OpenSSL where this machine keeps those.

    The one in psycopg's wheels looks in a folder that is on no machine; Python's looks in the right one.
    """
    if given.get("sslrootcert", os.environ.get("PGSSLROOTCERT")) != "system":
        return
    places = ssl.get_default_verify_paths()
    named = {places.openssl_cafile_env: places.cafile, places.openssl_capath_env: places.capath}
    if not named.keys() & os.environ.keys():
        os.environ.update({variable: place for variable, place in named.items() if place is not None})


def out_of_date(parameters: Mapping[str, Any]) -> str | None:
    """OpenSSL's words where the certificate of one of the hosts is out of date; libpq says only that it is not trusted.

    Asks the servers again and blocks, where they answer, for milliseconds.
    """
    given = {option.keyword.decode(): option.val.decode() for option in pq.Conninfo.get_defaults() if option.val}
    given |= {name: str(value) for name, value in parameters.items()}
    root = given.get("sslrootcert") or str(Path.home() / ".postgresql" / "root.crt")
    hosts, ports = (given.get("hostaddr") or given.get("host", "")).split(","), given.get("port", "5432").split(",")
    for host, port in zip(hosts, ports if len(ports) == len(hosts) else ports[:1] * len(hosts), strict=True):
        try:
            context = ssl.create_default_context(cafile=None if root == "system" else root)
            context.check_hostname = False
            with socket.create_connection((host, int(port)), timeout=_LOOK_LIMIT) as wire:
                wire.sendall(_SSL_REQUEST)
                if wire.recv(1) == b"S":
                    context.wrap_socket(wire).close()
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _OUT_OF_DATE:
                return error.verify_message
        except (OSError, ValueError):
            continue
    return None


def unproven(info: psycopg.ConnectionInfo, pgconn: pq.abc.PGconn) -> str | None:
    """Why it is not sure that this is the server that the DSN names, and what to write there; None where it is, and
    where it is on this machine."""
    used = {option.keyword.decode(): option.val.decode() for option in pgconn.info if option.val}
    if is_here(info.host) or used.get("sslmode") == "verify-full":
        return None
    return (
        f"sslmode={used.get('sslmode', 'prefer')} does not prove that the server is {info.host}: whoever is in between "
        "can read the password and change events. Write sslmode=verify-full sslrootcert=FILE, with the certificate of "
        "the authority that signed the server's"
    )
