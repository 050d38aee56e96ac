"""The yard's own key, which signs what it says of its images.

It lies in the data folder beside the token, ``signing.key`` (PEM, mode 0600), made at first use. Two builders that
should sign as one get the same file: put it there before the first start, or instead of the one that was made.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from ..core.attest import PublicKey, envelope, to_sign, told
from ..core.errors import Unavailable
from ..kernel.folder import SIGNING_KEY, write_once


@dataclass(frozen=True)
class Signer:
    """A private key at work; it shows only its public half."""

    public: PublicKey
    _private: Ed25519PrivateKey

    def sign(self, payload: bytes) -> dict[str, Any]:
        """The DSSE envelope of a statement's bytes."""
        return envelope(payload, self.public.id, self._private.sign(to_sign(payload)))

    def __repr__(self) -> str:
        return f"Signer({self.public.id[:16]})"


async def signer(data: Path) -> Signer:
    """The key of a data folder. Unavailable when its file cannot be used, saying why: a build waits for that."""
    return await asyncio.to_thread(_signer, data / SIGNING_KEY)


def _signer(path: Path) -> Signer:
    try:
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            write_once(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())
        return _read(path, path.stat().st_mtime_ns)
    except OSError as exc:
        raise Unavailable(f"the signing key {path} cannot be read: {exc.strerror or exc}") from exc


@functools.lru_cache(8)
def _read(path: Path, changed: int) -> Signer:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise Unavailable(f"the signing key {path} is not a private key in PEM without a password; put one there "
                          "(openssl genpkey -algorithm ed25519), or take it away and a new one is made") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise Unavailable(f"the signing key {path} is not an Ed25519 key; make one: openssl genpkey -algorithm ed25519")
    return Signer(told(key.public_key()), key)
