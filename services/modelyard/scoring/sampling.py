"""Which successful calls are recorded: by lot, and calls that share a key share the lot. Standard library only, until
a key is looked for inside a body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from .calls import Call

ALL = 2**32


class Sampler:
    """A share of calls and what the lot is drawn by (``core.specs.Capture``). A larger share keeps what a smaller one
    keeps; every replica draws the same."""

    def __init__(self, policy: Mapping[str, Any]) -> None:
        self._below = round(float(policy.get("sampling", 1.0)) * ALL)
        kind, _, name = str(policy.get("sampling_key") or "prediction_id").partition(":")
        self.every = self._below >= ALL
        self.keyed = kind != "prediction_id" and 0 < self._below < ALL
        """The prediction id alone does not tell."""
        self.header = name if kind == "header" and self.keyed else ""
        """The header that transports put into ``Call.key``."""
        self._kind, self._name = kind, name
        self._drawn: dict[str, bool] = {}

    def expect(self, prediction_id: str, call: Call) -> None:
        """Draws for a call under way, which is known by its prediction id from then on."""
        if self.keyed:
            self._drawn[prediction_id] = self._chosen(prediction_id, call)

    def peek(self, prediction_id: str) -> bool:
        """Whether this call is chosen, while it is under way."""
        drawn = self._drawn.get(prediction_id)
        return self._by_id(prediction_id) if drawn is None else drawn

    def take(self, prediction_id: str) -> bool:
        """The same of a call that ended."""
        drawn = self._drawn.pop(prediction_id, None) if self.keyed else None
        return self._by_id(prediction_id) if drawn is None else drawn

    def _by_id(self, prediction_id: str) -> bool:
        """A call by itself."""
        return crc32(prediction_id.encode("utf-8", "replace")) < self._below

    def _chosen(self, prediction_id: str, call: Call) -> bool:
        """A call by its key; by itself when it has none."""
        key = self._key(call)
        if not key:
            return self._by_id(prediction_id)
        # Not a CRC: keys that people give are alike, and a CRC of what is alike is alike too.
        drawn = blake2b(key.encode("utf-8", "replace"), digest_size=4).digest()
        return int.from_bytes(drawn, "big") < self._below

    def _key(self, call: Call) -> str:
        if self._kind == "input":
            return _input(call, self._name)
        return {"request_id": call.request_id, "trace_id": call.trace_id, "header": call.key}.get(self._kind, "")


def _input(call: Call, name: str) -> str:
    """An input's values as text, the same by whichever protocol they came; one value alone without its brackets."""
    from ..core.decode import inputs

    try:
        value = inputs(call.protocol, call.body, call.body_type).get(name)
    except Exception:  # noqa: BLE001 - whatever a body is, it has no key then
        return ""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), sort_keys=True, default=str)
