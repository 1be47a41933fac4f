"""Signatures of the Standard Webhooks specification: `v1` with a shared secret, `v1a` with a key pair."""

import binascii
import hmac
import re
import secrets as random
from base64 import b64encode
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SECRET: Final = "whsec_"  # noqa: S105
PRIVATE: Final = "whsk_"
PUBLIC: Final = "whpk_"
"""How a secret begins that both sides have, and the two halves of a key pair."""

_SHORTEST: Final = 24
_LONGEST: Final = 64
_NEW: Final = 32
"""Bytes of a shared secret."""

_SEED: Final = 32
"""Bytes of a private key. Some write its public half behind it."""

_ID: Final = re.compile(r"[!-\-/-~]+")
"""Printable ASCII without a full stop: with one, `a.1` at 2 and `a` at `1.2` would have the same signature."""


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: a signature for each secret, so that a secret can be replaced while both count.

    `timestamp` is the attempt's, in seconds since 1970. Raises ValueError for a secret or an id that cannot be used.
    """
    if not secrets:
        raise ValueError("there is no secret to sign with")
    if not _ID.fullmatch(message_id):
        raise ValueError("the id of a message is printable ASCII, without spaces and full stops")
    content = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    return " ".join(_signature(secret, content) for secret in secrets)


def new_secret() -> str:
    """A random one for both sides."""
    return SECRET + b64encode(random.token_bytes(_NEW)).decode()


def new_key_pair() -> tuple[str, str]:
    """A private key, and the public one for whoever receives."""
    private = PRIVATE + b64encode(Ed25519PrivateKey.generate().private_bytes_raw()).decode()
    return private, public_key(private)


def public_key(private: str) -> str:
    """The public key of a private one. Raises ValueError for anything else."""
    if not private.startswith(PRIVATE):
        raise ValueError(f"only a private key, which begins with {PRIVATE}, has a public one")
    return PUBLIC + b64encode(_private_key(private).public_key().public_bytes_raw()).decode()


def check_secret(secret: str) -> None:
    """Raises ValueError, which says what is wrong and does not show the secret."""
    if secret.startswith(PRIVATE):
        _private_key(secret)
    else:
        _shared(secret)


def _signature(secret: str, content: bytes) -> str:
    if secret.startswith(PRIVATE):
        return "v1a," + b64encode(_private_key(secret).sign(content)).decode()
    return "v1," + b64encode(hmac.digest(_shared(secret), content, "sha256")).decode()


def _shared(secret: str) -> bytes:
    if secret.startswith(PUBLIC):
        raise ValueError(f"a public key ({PUBLIC}) only verifies: to sign, give the private one ({PRIVATE})")
    if not secret.startswith(SECRET):
        raise ValueError(f"a secret begins with {SECRET}, or with {PRIVATE} where it is a private key")
    key = _decoded(secret, SECRET)
    if not _SHORTEST <= len(key) <= _LONGEST:
        raise ValueError(f"a secret has {_SHORTEST} to {_LONGEST} bytes behind {SECRET}, and this one {len(key)}")
    return key


def _private_key(secret: str) -> Ed25519PrivateKey:
    given = _decoded(secret, PRIVATE)
    if len(given) not in (_SEED, 2 * _SEED):
        raise ValueError(
            f"a private key has {_SEED} bytes behind {PRIVATE}, or {2 * _SEED} with its public half, and this one "
            f"{len(given)}"
        )
    key = Ed25519PrivateKey.from_private_bytes(given[:_SEED])
    if given[_SEED:] not in (b"", key.public_key().public_bytes_raw()):
        raise ValueError(f"the second half of a private key of {2 * _SEED} bytes is its public key, and here it is not")
    return key


def _decoded(secret: str, prefix: str) -> bytes:
    text = secret.removeprefix(prefix)
    try:
        # Some leave the padding out, and verify without it.
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:
        # Without the cause, which may show a part of the secret.
        raise ValueError(f"what is behind {prefix} is not base64") from None
