"""Which successful calls are recorded: by lot, and calls that share a key share the lot. Standard library only, until
a key is looked for inside a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self._only: dict[str, str] = {}

    def learn(self, model: str, inputs: Sequence[str]) -> None:
        """What a model calls its inputs: an only one is found under any name."""
        self._only[model] = inputs[0] if len(inputs) == 1 else ""

    def expect(self, prediction_id: str, call: Call, model: str = "") -> None:
        """Draws for a call under way, which is known by its prediction id from then on."""
        if self.keyed:
            self._drawn[prediction_id] = self._chosen(prediction_id, call, model)

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

    def _chosen(self, prediction_id: str, call: Call, model: str) -> bool:
        """A call by its key; by itself when it has none."""
        key = self._key(call, model)
        if not key:
            return self._by_id(prediction_id)
        # Not a CRC: keys that people give are alike, and a CRC of what is alike is alike too.
        drawn = blake2b(key.encode("utf-8", "replace"), digest_size=4).digest()
        return int.from_bytes(drawn, "big") < self._below

    def _key(self, call: Call, model: str) -> str:
        if self._kind == "input":
            from .sampling_keys import key_of

            return key_of(call, self._name, self._only.get(model, ""))
        return {"request_id": call.request_id, "trace_id": call.trace_id, "header": call.key}.get(self._kind, "")
