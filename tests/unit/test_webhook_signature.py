"""Signatures, as the specification's own library and `cryptography` see them."""

import time
from base64 import b64decode, b64encode

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from workers.webhooks.signature import check_secret, new_key_pair, new_secret, public_key, sign

IDS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="."), min_size=1)
BODIES = st.text().map(str.encode)  # the library takes UTF-8 only
SHARED = st.binary(min_size=24, max_size=64).map(lambda key: "whsec_" + b64encode(key).decode())
PRIVATE = st.binary(min_size=32, max_size=32).map(lambda seed: "whsk_" + b64encode(seed).decode())


def headers(id: str, timestamp: int, signature: str) -> dict[str, str]:
    return {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}


def verify_key(public: str, signature: str, content: bytes) -> None:
    version, _, value = signature.partition(",")
    assert version == "v1a"
    key = Ed25519PublicKey.from_public_bytes(b64decode(public.removeprefix("whpk_")))
    key.verify(b64decode(value), content)


def test_the_example_that_the_libraries_of_all_languages_share() -> None:
    signature = sign(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_private_key_signs_as_in_rfc_8032() -> None:
    # The public key of RFC 8032, 7.1, TEST 1; ed25519 has one signature for each key and content.
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    private = "whsk_" + b64encode(seed).decode()
    assert public_key(private) == "whpk_" + b64encode(public).decode()
    both = "whsk_" + b64encode(seed + public).decode()
    assert sign([both], "m", 1, b"") == sign([private], "m", 1, b"")
    verify_key(public_key(both), sign([both], "m", 1, b"{}"), b"m.1.{}")


@given(IDS, BODIES, SHARED, SHARED)
def test_old_and_new_secret_both_verify_while_one_replaces_the_other(id: str, body: bytes, old: str, new: str) -> None:
    now = int(time.time())
    signature = sign([new, old], id, now, body)
    for secret in (old, new):
        Webhook(secret).verify(body, headers(id, now, signature), json_parse=False)


@given(IDS, BODIES, SHARED, PRIVATE)
def test_both_kinds_of_signatures_stand_side_by_side(id: str, body: bytes, secret: str, private: str) -> None:
    now = int(time.time())
    signature = sign([secret, private], id, now, body)
    Webhook(secret).verify(body, headers(id, now, signature), json_parse=False)
    first, second = signature.split(" ")
    assert first.startswith("v1,")
    verify_key(public_key(private), second, f"{id}.{now}.".encode() + body)


def test_another_body_id_time_or_secret_does_not_verify() -> None:
    secret, now = new_secret(), int(time.time())
    signature = sign([secret], "m", now, b"1")
    Webhook(secret).verify(b"1", headers("m", now, signature))
    changed = [(secret, b"2", "m", now), (secret, b"1", "n", now), (secret, b"1", "m", now + 1)]
    for other, body, id, at in [*changed, (new_secret(), b"1", "m", now)]:
        with pytest.raises(WebhookVerificationError):
            Webhook(other).verify(body, headers(id, at, signature))
    private, public = new_key_pair()
    signature = sign([private], "m", now, b"1")
    verify_key(public, signature, b"m.%d.1" % now)
    with pytest.raises(InvalidSignature):
        verify_key(public, signature, b"m.%d.2" % now)


def test_new_secrets_and_keys_fit_and_differ() -> None:
    assert len({new_secret() for _ in range(100)}) == 100
    assert len({new_key_pair() for _ in range(100)}) == 100
    check_secret(new_secret())
    private, public = new_key_pair()
    check_secret(private)
    assert public_key(private) == public


@pytest.mark.parametrize("id", ["", "a.b", ".", "a b", "a\n", "é", "a\r\nx"])
def test_an_id_that_could_be_read_in_two_ways_is_refused(id: str) -> None:
    with pytest.raises(ValueError, match="the id of a message"):
        sign([new_secret()], id, 1, b"")


def test_without_a_secret_nothing_is_signed() -> None:
    with pytest.raises(ValueError, match="no secret"):
        sign([], "m", 1, b"")


KEY = b64encode(b"0123456789abcdefghijklmnopqrstuv").decode()


@pytest.mark.parametrize(
    ("secret", "complaint"),
    [
        (KEY, "begins with whsec_"),
        (f"WHSEC_{KEY}", "begins with whsec_"),
        (f"whpk_{KEY}", "only verifies"),
        (f"whsec_{KEY[:-4]}!{KEY[-4:]}", "not base64"),
        (f"whsec_{KEY}\n", "not base64"),
        (f"whsec_{KEY}\u00e9", "not base64"),
        ("whsec_" + b64encode(b"x" * 23).decode(), "24 to 64 bytes"),
        ("whsec_" + b64encode(b"x" * 65).decode(), "24 to 64 bytes"),
        ("whsec_", "24 to 64 bytes"),
        ("whsk_" + b64encode(b"x" * 31).decode(), "32 bytes"),
        ("whsk_" + b64encode(b"x" * 33).decode(), "32 bytes"),
        ("whsk_" + b64encode(b"x" * 64).decode(), "its public key"),
        ("whsk_%%%", "not base64"),
        ("", "begins with whsec_"),
    ],
)
def test_a_wrong_secret_is_refused_without_being_shown(secret: str, complaint: str) -> None:
    for refuse in (lambda: check_secret(secret), lambda: sign([new_secret(), secret], "m", 1, b"")):
        with pytest.raises(ValueError, match=complaint) as refused:
            refuse()
        value = secret.removeprefix("whsec_").removeprefix("whsk_").removeprefix("whpk_").strip()
        assert not value or value not in str(refused.value)
        assert refused.value.__cause__ is None


def test_a_secret_without_its_padding_is_the_same_secret() -> None:
    secret = new_secret()
    assert secret.endswith("=")
    assert sign([secret.rstrip("=")], "m", 1, b"") == sign([secret], "m", 1, b"")


def test_only_a_private_key_has_a_public_one() -> None:
    with pytest.raises(ValueError, match="only a private key"):
        public_key(new_secret())
