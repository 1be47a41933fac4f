"""Who we are to a NATS server that takes signatures: an NKey, or a credentials file with a JWT and its NKey.

The library `nkeys` is imported on use: a server that takes passwords needs none of it.
"""

import base64
import importlib.util
import re
from dataclasses import dataclass, field
from typing import Final

_SEED_OF_A_USER: Final = re.compile("SU[A-Z2-7]{56}")
_JWT: Final = re.compile(r"-+BEGIN NATS USER JWT-+\s+(\S+)\s+-+END NATS USER JWT-+")
_SEED: Final = re.compile(r"-+BEGIN USER NKEY SEED-+\s+(\S+)\s+-+END USER NKEY SEED-+")


@dataclass(frozen=True, slots=True)
class SignedLogin:
    """A user's private key, and the JWT that makes it a user, where the server wants one."""

    seed: str = field(repr=False)
    jwt: str | None = field(default=None, repr=False)

    def answer(self, nonce: str) -> dict[str, str]:
        """What a CONNECT says to a server whose greeting holds this nonce."""
        import nkeys

        pair = nkeys.from_seed(bytearray(self.seed.encode()))
        who = {"nkey": pair.public_key.decode()} if self.jwt is None else {"jwt": self.jwt}
        return {**who, "sig": base64.b64encode(pair.sign(nonce.encode())).decode()}


def nkey_login(seed: str) -> SignedLogin:
    """Of the seed of a user's NKey. Raises ValueError, whose words hold nothing of it."""
    login = SignedLogin(seed.strip())
    _require_seed(login.seed)
    return login


def credentials_login(text: str) -> SignedLogin:
    """Of what a credentials file holds, as `nsc` writes it. Raises ValueError, whose words hold nothing of it."""
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        missing = "JWT" if jwt is None else "NKey seed"
        raise ValueError(f"holds no {missing} of a user; name the file that `nsc generate creds` writes")
    _require_seed(seed[1])
    return SignedLogin(seed[1], jwt[1])


def _require_seed(seed: str) -> None:
    if importlib.util.find_spec("nkeys") is None:
        raise ValueError("needs the package 'nkeys': pip install 'pgbridge[nats]'")
    import nkeys

    try:
        is_user = _SEED_OF_A_USER.fullmatch(seed) is not None and bool(nkeys.from_seed(bytearray(seed.encode())))
    except (nkeys.NkeysError, ValueError):
        is_user = False
    if not is_user:
        raise ValueError("holds no NKey seed of a user; it begins with SU and has 58 letters and digits")
