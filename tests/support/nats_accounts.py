"""NKeys and JWTs as `nsc` makes them: an operator that signs accounts, which sign users."""

import base64
import hashlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import nkeys

_UNLIMITED = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
_STORED = ("mem_storage", "disk_storage", "streams", "consumer")


class Key:
    """One NKey."""

    def __init__(self, prefix: int) -> None:
        """`prefix`: one of nkeys.PREFIX_BYTE_USER and its like."""
        self.seed = nkeys.encode_seed(os.urandom(32), prefix).decode()

    @property
    def _pair(self) -> Any:
        return nkeys.from_seed(bytearray(self.seed.encode()))

    @property
    def public(self) -> str:
        return str(self._pair.public_key.decode())

    def sign(self, subject: "Key", name: str, claims: Mapping[str, Any], *, expires: float | None = None) -> str:
        """The JWT that makes `subject` what the claims say; `expires` is seconds from now."""
        now = int(time.time())
        body = {
            "jti": hashlib.sha256(os.urandom(16)).hexdigest(),
            "iat": now,
            "iss": self.public,
            "name": name,
            "sub": subject.public,
            **({} if expires is None else {"exp": int(now + expires)}),
            "nats": {**claims, "version": 2},
        }
        text = ".".join(_encoded(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body))
        return f"{text}.{_encoded(self._pair.sign(text.encode()))}"


class Accounts:
    """An operator with one account that has JetStream, and lines for the server that knows them."""

    def __init__(self) -> None:
        operator, system, self.account = (
            Key(prefix) for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
        )
        limits = {**dict.fromkeys(_UNLIMITED, -1), "wildcards": True}
        known = {
            system.public: operator.sign(system, "SYS", {"type": "account", "limits": limits}),
            self.account.public: operator.sign(
                self.account, "shop", {"type": "account", "limits": limits | dict.fromkeys(_STORED, -1)}
            ),
        }
        preload = "\n".join(f"{public}: {jwt}" for public, jwt in known.items())
        self.lines = [
            f"operator {operator.sign(operator, 'test', {'type': 'operator'})}",
            f"system_account {system.public}",
            "resolver MEMORY",
            f"resolver_preload {{\n{preload}\n}}",
        ]

    def credentials(self, *, expires: float | None = None, signed_by: Key | None = None) -> str:
        """A credentials file of a new user."""
        user = Key(nkeys.PREFIX_BYTE_USER)
        claims = {"type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
        jwt = (signed_by or self.account).sign(user, "bridge", claims, expires=expires)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
