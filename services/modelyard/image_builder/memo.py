"""What was made before from the same inputs: small JSON files, named by the digest of those inputs.

Only a cache: losing it costs time. An entry names layers by digest; they are used only while the store has them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def key(*inputs: Any) -> str:
    """The digest of JSON values: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Memo:
    """One folder of entries, shared by processes: each entry is written whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def get(self, name: str) -> Any:
        """The entry, or None."""
        return await asyncio.to_thread(self._read, name)

    async def put(self, name: str, value: Any) -> None:
        """Stores or replaces the entry."""
        await asyncio.to_thread(self._write, name, value)

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
