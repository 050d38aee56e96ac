"""Signed statements about images: an in-toto Statement v1 with SLSA v1 provenance, in a DSSE envelope, by Ed25519 keys.

Pure but for the arithmetic of ``cryptography``. Whoever checks needs an envelope and the public keys that he trusts:

    statement = opened(envelope, public_keys(Path("yard.pub").read_bytes()))    # Invalid, code ``unsigned``
    subject(statement)                                                          # 'sha256:…' of the image's manifest
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import Invalid

ENVELOPE = "application/vnd.dsse.envelope.v1+json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)
HEX = re.compile(r"^[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key that signatures are checked with. ``id`` is the SHA-256 of its DER form, in hexadecimal digits."""

    id: str
    pem: str
    raw: bytes

    def signed(self, signature: bytes, data: bytes) -> bool:
        """Whether the signature is this key's, of these bytes."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except InvalidSignature:
            return False
        return True


def public_keys(pem: bytes, source: str = "the key") -> list[PublicKey]:
    """The keys of a PEM text, one or several behind each other. Invalid when there is none, or another kind."""
    found = [public_key(block, source) for block in PEM.findall(pem)]
    if not found:
        raise Invalid(f"{source} holds no public key: -----BEGIN PUBLIC KEY-----, as modelyard images key prints it")
    return found


def public_key(pem: bytes, source: str = "the key") -> PublicKey:
    """One key of PEM. Invalid."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise Invalid(f"{source} cannot be read as a public key: {exc}") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise Invalid(f"{source} is not an Ed25519 key; images are signed by no other kind")
    return told(key)


def told(key: Any) -> PublicKey:
    """An ``Ed25519PublicKey`` in our terms."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(hashlib.sha256(der).hexdigest(), pem.decode(), key.public_bytes_raw())


def to_sign(payload: bytes, kind: str = PAYLOAD) -> bytes:
    """What is signed of a payload: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def envelope(payload: bytes, key_id: str, signature: bytes) -> dict[str, Any]:
    """The DSSE envelope of a statement."""
    return {"payloadType": PAYLOAD, "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": key_id, "sig": base64.b64encode(signature).decode()}]}


def opened(given: Any, keys: Sequence[PublicKey]) -> dict[str, Any]:
    """The statement in an envelope that one of ``keys`` signed. Invalid, code ``unsigned``, for any other."""
    try:
        kind, payload = str(given["payloadType"]), base64.b64decode(given["payload"], validate=True)
        signatures = [(str(s.get("keyid", "")), base64.b64decode(s["sig"], validate=True)) for s in given["signatures"]]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _unsigned("the provenance is not a DSSE envelope") from exc
    if kind != PAYLOAD:
        raise _unsigned(f"the provenance holds {kind[:100]}, not {PAYLOAD}")
    data = to_sign(payload, kind)
    if not any(key.signed(signature, data) for key in keys for _, signature in signatures):
        named = ", ".join(id[:16] for id, _ in signatures if id) or "nobody"
        raise _unsigned(f"the provenance is not signed by {' or '.join(k.id[:16] for k in keys)}; it names {named}")
    try:
        statement = json.loads(payload)
    except ValueError as exc:
        raise _unsigned("the signed statement is not JSON") from exc
    if not isinstance(statement, dict) or (statement.get("_type"), statement.get("predicateType")) != (
            STATEMENT, PROVENANCE):
        raise _unsigned("the signed statement is not SLSA provenance, version 1")
    return statement


def _unsigned(message: str) -> Invalid:
    return Invalid(message, code="unsigned")


def subject(statement: Mapping[str, Any]) -> str:
    """The digest of the one image that a statement is about. Invalid, code ``unsigned``, when that is not clear."""
    subjects = statement.get("subject")
    try:
        (only,) = subjects  # type: ignore[misc]
        found = str(only["digest"]["sha256"])
    except (ValueError, KeyError, TypeError) as exc:
        raise _unsigned("the signed statement is not about one image") from exc
    if not HEX.match(found):
        raise _unsigned("the signed statement names no digest")
    return f"sha256:{found}"


def require(given: Any, keys: Sequence[PublicKey], digest: str) -> dict[str, Any]:
    """The statement about the image ``digest``, signed by one of ``keys``. Invalid, code ``unsigned``."""
    statement = opened(given, keys)
    if (named := subject(statement)) != digest:
        raise _unsigned(f"the signed statement is about {named[:19]}, not about {digest[:19]}")
    return statement
