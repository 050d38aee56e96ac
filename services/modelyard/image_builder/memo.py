"""What was made before from the same inputs: small JSON files, named by the digest of those inputs.

Only a cache: losing it costs time. An entry names layers by digest; they are used only while the store has them.
What any data folder may know (packages, never models) is in the user's cache, too, with a checksum before it, since
nobody repairs what is damaged there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from ..kernel.cache import Cache

KIND = "memo-v1"


def key(*inputs: Any) -> str:
    """The digest of JSON values: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Memo:
    """One folder of entries, shared by processes: each entry is written whole. ``cache`` is the user's."""

    def __init__(self, folder: Path, cache: Cache) -> None:
        self._folder = folder
        self._cache = cache

    async def get(self, name: str) -> Any:
        """The entry, or None."""
        return await asyncio.to_thread(self._read, name)

    async def shared(self, name: str) -> Any:
        """The entry in the user's cache, or None."""
        return await asyncio.to_thread(self._read_shared, name)

    async def put(self, name: str, value: Any, *, shared: bool = False) -> None:
        """Stores or replaces the entry; ``shared``: for other data folders as well."""
        await asyncio.to_thread(self._write, name, value)
        if shared:
            await asyncio.to_thread(self._write_shared, name, value)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self._folder / f"{name}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _write(self, name: str, value: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        side = self._folder / f".{secrets.token_hex(8)}"
        side.write_text(json.dumps(value))
        os.replace(side, self._folder / f"{name}.json")

    def _read_shared(self, name: str) -> Any:
        if (path := self._cache.find(KIND, name)) is None:
            return None
        try:
            check, _, text = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        if hashlib.sha256(text).hexdigest().encode() == check:
            return json.loads(text)
        self._cache.drop(KIND, name)
        return None

    def _write_shared(self, name: str, value: Any) -> None:
        text = json.dumps(value).encode()
        body = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        self._cache.keep(KIND, name, lambda beside: _write_new(beside, body))


def _write_new(path: Path, body: bytes) -> None:
    path.write_bytes(body)
