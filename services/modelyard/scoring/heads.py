"""What calls of one model have in common, so that it is read and written once: of a ModelInferRequest everything before
the raw contents of its only tensor, of a ModelInferResponse everything but the id and the raw contents.

Exact, not likely: serialized messages put one behind the other are one message, so two requests that are equal up to
their last field are equal but for that field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.errors import Invalid
from ..core.inference import PROTO, contents_tag, names_bytes, outputs_bytes, parse_request
from ..core.tensors import dtype_of, to_wire
from .calls import Asked, Served, Writer

if TYPE_CHECKING:
    from ..core.tensors import Array
    from .parts import Rows

HEAD_BYTES, HEADS = 4_096, 256
AGAIN = 16
"""Of so many requests that are as long as a known one and begin otherwise, one takes its place."""
VIEW_BYTES = 65_536
"""A batch's contents above this are not copied before they are taken apart."""


class Head:
    """The beginning of requests, and what it says. ``parts``: runner → what it makes of it (its own affair)."""

    __slots__ = ("_at", "_dtype", "begins", "datatype", "id", "model", "name", "outputs", "parts", "shape", "version")

    def __init__(self, begins: bytes, message: Any, asked: Asked) -> None:
        assert asked.tensors is not None
        (tensor,) = asked.tensors
        self.begins, self._at = begins, len(begins)
        self.model, self.version, self.id = asked.model, asked.version, asked.id
        self.outputs = asked.outputs
        self.name, self.datatype, self.shape = tensor.name, tensor.datatype, tensor.array.shape
        self._dtype = tensor.array.dtype
        self.parts: dict[Any, Any] = {}

    def array(self, body: bytes) -> Array:
        """The tensor of a request that begins so."""
        import numpy as np

        return np.ndarray(self.shape, self._dtype, body[self._at:])

    def view(self, body: bytes) -> Array:
        """The same without a copy: where it lies in the request, so mostly not aligned."""
        import numpy as np

        return np.ndarray(self.shape, self._dtype, body, self._at)


class Heads:
    """The heads of a codec, by the length of the request: the last one seen of each."""

    def __init__(self) -> None:
        self._known: dict[int, Head] = {}
        self._missed = 0

    def find(self, body: bytes) -> Head | None:
        """The head of a request, if it is known."""
        head = self._known.get(len(body))
        return head if head is not None and body.startswith(head.begins) else None

    def learn(self, body: bytes, message: Any, asked: Asked) -> None:
        """Looks at a request that was read, whether others may be read by it."""
        if len(body) in self._known:
            self._missed += 1
            if self._missed % AGAIN:
                return
        entries, raws = message.inputs, message.raw_input_contents
        if len(raws) != 1 or len(entries) != 1 or not raws[0] or entries[0].parameters \
                or dtype_of(entries[0].datatype) is None:
            return
        begins = body[:-len(raws[0])]
        tag = contents_tag(7, len(raws[0]))
        if len(begins) > HEAD_BYTES or not begins.endswith(tag) or not body.endswith(raws[0]):
            return
        try:
            if parse_request(begins[:-len(tag)]).raw_input_contents:
                return
        except Invalid:
            return  # what stands there is no field of its own
        if len(self._known) >= HEADS:
            self._known.clear()
        self._known[len(body)] = Head(begins, message, asked)


def writer(rows: Rows, served: Served) -> Writer | None:
    """Writes raw answers of these rows; None: they are not plain arrays."""
    columns = []
    try:
        for name, given in rows.arrays.items():
            array, datatype = to_wire(name, given)
            if datatype == "BYTES" or not array.size:
                return None
            data: Any = array.tobytes() if array.nbytes <= VIEW_BYTES else memoryview(array).cast("B")  # type: ignore[arg-type]
            columns.append((name, datatype, array.shape[1:], array.nbytes // len(array), data))
    except Invalid:
        return None  # it is said of each call by itself
    names, kinds = names_bytes(served.name, served.version), len(columns)
    known: dict[int, list[bytes]] = {}

    def write(asked: Asked, start: int, end: int) -> tuple[bytes, str] | None:
        if not asked.raw or (asked.outputs and len(asked.outputs) != kinds):
            return None
        count = end - start
        head = known.get(count)
        if head is None:
            told = outputs_bytes(tuple([(name, datatype, (count, *rest)) for name, datatype, rest, _, _ in columns]))
            tags = [contents_tag(6, count * width) for _, _, _, width, _ in columns]
            head = known[count] = [told + tags[0], *tags[1:]]
        pieces = [names, contents_tag(3, len(given := asked.id.encode())), given] if asked.id else [names]
        for tag, (_, _, _, width, data) in zip(head, columns, strict=True):
            pieces += (tag, data[start * width:end * width])
        return b"".join(pieces), PROTO

    return write
