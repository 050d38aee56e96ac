"""Tensors: Open Inference Protocol v2 datatypes to and from numpy, in raw, typed and JSON form.

A tensor whose bytes, values, shape and datatype do not fit together is ``Invalid``, and the message names it.
BYTES tensors are object arrays of ``bytes``. BF16, which numpy lacks, is read as float32 and never written.
Messages (whole requests and responses) are in ``inference.py``. numpy is imported when the first array is made.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import Invalid
from .numbers import MANY, numbers

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: dict[str, str] = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2",
    "INT32": "i4", "INT64": "i8", "FP16": "f2", "FP32": "f4", "FP64": "f8", "BF16": "f4", "BYTES": "O",
}
"""Datatype → numpy's name of it."""
DATATYPES: dict[str, str] = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
FIELDS: dict[str, str] = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}
"""Datatype → its field of InferTensorContents; FP16 and BF16 have none: they travel raw."""
WIRE: dict[str, str] = {"uint_contents": "u4", "int_contents": "i4"}
"""Fields that hold several datatypes → what the field itself holds."""
PACKED: dict[str, bytes] = {"BOOL": b"\x0a", "FP32": b"\x32", "FP64": b"\x3a"}
"""Datatype → the tag of its field, where the field's packed elements are the array's own bytes: a hundred times faster
both ways than element by element."""
SMALL = tuple(bytes((n,)) for n in range(128))
ITEM: dict[str, int] = {name: 2 if name == "BF16" else int(dtype[1:] or 1) if dtype != "?" else 1
                        for name, dtype in DTYPES.items() if name != "BYTES"}
MAX_RANK = 32
MOST = 2**40
LITTLE = sys.byteorder == "little"


@dataclass(slots=True)
class Tensor:
    """A named array as the protocol knows it. ``datatype`` is the protocol's, ``array`` has the tensor's shape."""

    name: str
    array: Array
    datatype: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.datatype:
            self.array, self.datatype = to_wire(self.name, self.array)


def bad(name: str, what: str) -> Invalid:
    """The error for a tensor: it names the tensor."""
    return Invalid(f"tensor '{name}': {what}", tensor=name)


def count(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements a shape holds. Invalid for an unknown datatype or a shape that cannot be."""
    if datatype not in DTYPES:
        raise bad(name, f"datatype '{datatype}' is unknown; use one of {', '.join(DTYPES)}")
    if len(shape) > MAX_RANK:
        raise bad(name, f"{len(shape)} dimensions are more than {MAX_RANK}")
    total = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise bad(name, f"shape {list(shape)} must be whole numbers of 0 or more")
        total *= size
    if total > MOST or (total == 0 and math.prod(size for size in shape if size) > MOST):  # numpy multiplies them too
        raise bad(name, f"shape {list(shape)} holds too many elements")
    return total


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Array:
    """Raw contents (little-endian, row-major) → array; fixed-size types share ``raw``'s memory, read-only."""
    shape = tuple(shape[:])
    total = count(name, datatype, shape)
    if datatype == "BYTES":
        return objects(name, _frames(name, raw), shape)
    if len(raw) != total * ITEM[datatype]:
        raise bad(name, f"{datatype} of shape {list(shape)} needs {total * ITEM[datatype]} raw bytes, not {len(raw)}")
    import numpy as np

    if datatype == "BF16":
        upper = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return upper.view(np.float32).reshape(shape)
    if datatype == "BOOL":
        return np.frombuffer(raw, "u1").astype(np.bool_).reshape(shape)
    array: Array = np.ndarray(shape, _stored()[datatype], raw)
    return array


def dtype_of(datatype: str) -> Any:
    """numpy's dtype of raw contents that are an array as they are; None of BOOL, BF16, BYTES and what there is not."""
    return _stored().get(datatype) if datatype not in ("BOOL", "BF16") else None


@functools.cache
def _stored() -> dict[str, Any]:
    """Datatype → numpy's dtype of its raw contents."""
    import numpy as np

    return {name: np.dtype("<" + dtype) for name, dtype in DTYPES.items() if name != "BYTES"}


@functools.cache
def _told() -> dict[str, str]:
    """Type characters of arrays that are as the protocol wants them, byte order apart → datatype."""
    import numpy as np

    chars = {char: np.dtype(char) for char in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
    found = {char: "?" if dtype.kind == "b" else f"{dtype.kind}{dtype.itemsize}" for char, dtype in chars.items()}
    return {char: DATATYPES[short] for char, short in found.items() if short in DATATYPES}


def to_raw(tensor: Tensor) -> bytes:
    """The tensor's elements as raw contents."""
    if tensor.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(item)) + item for item in tensor.array.ravel().tolist())
    return tensor.array.tobytes()


def _frames(name: str, raw: bytes | memoryview) -> list[bytes]:
    """BYTES elements: each a 4-byte little-endian length and that many bytes."""
    items, at, end = [], 0, len(raw)
    while at < end:
        if at + 4 > end:
            raise bad(name, f"BYTES contents end inside a length, at byte {at}")
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + size > end:
            raise bad(name, f"a BYTES element of {size} bytes does not fit the {end - at} bytes left")
        items.append(bytes(raw[at:at + size]))
        at += size
    return items


def objects(name: str, items: Sequence[Any], shape: Sequence[int]) -> Array:
    """An object array of ``shape``. Invalid when the number of items is another."""
    import numpy as np

    if len(items) != math.prod(shape):
        raise bad(name, f"shape {list(shape)} needs {math.prod(shape)} elements, not {len(items)}")
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(tuple(shape))


def from_typed(name: str, datatype: str, shape: Sequence[int], contents: Any) -> Array:
    """Typed contents (an InferTensorContents) → array. Invalid when another field than the datatype's is filled."""
    import numpy as np

    total = count(name, datatype, shape)
    wanted = FIELDS.get(datatype)
    if wanted is None:
        raise bad(name, f"{datatype} has no typed contents; send it in raw_input_contents")
    filled = [f.name for f, _ in contents.ListFields()]
    if any(f != wanted for f in filled):
        raise bad(name, f"{datatype} belongs in {wanted}, not in {', '.join(f for f in filled if f != wanted)}")
    values = getattr(contents, wanted)
    if len(values) != total:
        raise bad(name, f"shape {list(shape)} needs {total} elements, not {len(values)}")
    if datatype == "BYTES":
        return objects(name, list(values), shape)
    if datatype in PACKED and total:
        size = total * ITEM[datatype]
        head, raw = PACKED[datatype] + varint(size), contents.SerializeToString()
        if raw.startswith(head) and len(raw) == len(head) + size:  # else it has fields that we do not know as well
            return np.frombuffer(raw, _stored()[datatype], total, len(head)).reshape(tuple(shape[:]))
    wide = np.array(values[:], WIRE.get(wanted, DTYPES[datatype]))
    return _narrow(name, wide, datatype).reshape(tuple(shape))


def _narrow(name: str, wide: Array, datatype: str) -> Array:
    import numpy as np

    if wide.dtype == DTYPES[datatype]:
        return wide
    with np.errstate(over="ignore", invalid="ignore"):
        array = wide.astype(DTYPES[datatype], copy=False)
    if array.dtype != wide.dtype and array.dtype.kind in "iu" and not np.array_equal(array, wide):
        raise bad(name, f"a value does not fit {datatype}")
    return array


def fill_typed(tensor: Tensor, contents: Any) -> None:
    """Puts the elements into an InferTensorContents. FP16 has no field: such a tensor is sent raw."""
    tag = PACKED.get(tensor.datatype)
    if tag is None:
        getattr(contents, FIELDS[tensor.datatype]).extend(tensor.array.ravel().tolist())
    elif tensor.array.size:
        raw = tensor.array.tobytes()
        contents.MergeFromString(b"".join((tag, varint(len(raw)), raw)))


def varint(number: int) -> bytes:
    """A length as protobuf writes it."""
    if number < 128:
        return SMALL[number]
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Array:
    """A v2 JSON tensor's ``data`` (flat or nested lists, row-major) → array."""
    import numpy as np

    total = count(name, datatype, shape)
    if not isinstance(data, list):
        raise bad(name, "data must be a list")
    if datatype == "BYTES":
        return objects(name, [_as_bytes(name, item) for item in _flat(data)], shape)
    try:
        found = numbers(data)
        array = np.array(data) if found is None else found
        if datatype == "UINT64" and array.dtype.kind == "f" and all(type(item) is int for item in _flat(data)):
            array = np.array(data, np.uint64)  # numpy makes floats of small and very large numbers together
    except (ValueError, TypeError, OverflowError) as exc:
        raise bad(name, f"data is not an array ({exc})") from exc
    if array.size == 0:
        array = np.empty(0, DTYPES[datatype])
    if array.dtype.kind not in ("b" if datatype == "BOOL" else "iuf" if datatype[:2] in ("FP", "BF") else "iu"):
        raise bad(name, f"data holds what is not {datatype}")
    if array.size != total:
        raise bad(name, f"shape {list(shape)} needs {total} elements, not {array.size}")
    return _narrow(name, array, datatype).reshape(tuple(shape))


def to_json(tensor: Tensor) -> Any:
    """The elements for ``orjson`` with ``OPT_SERIALIZE_NUMPY``, flat: BYTES as text; what is not UTF-8 cannot be JSON:
    Invalid. float32 is written with float64's digits, which say exactly what it is."""
    if tensor.datatype != "BYTES":
        flat = tensor.array.ravel()
        if flat.size < MANY or flat.dtype.kind == "b":
            return flat.tolist()
        return flat.astype("f8", copy=False) if flat.dtype.kind == "f" else flat
    try:
        return [item.decode() for item in tensor.array.ravel().tolist()]
    except UnicodeDecodeError as exc:
        raise bad(tensor.name, "holds bytes that are not UTF-8 text; ask for it as binary data or over gRPC") from exc


def _flat(data: list[Any]) -> Iterable[Any]:
    for item in data:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _as_bytes(name: str, item: Any) -> bytes:
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    if isinstance(item, bytes):
        return item
    raise bad(name, f"BYTES elements are text or bytes, not {type(item).__name__}")


def to_wire(name: str, array: Any) -> tuple[Array, str]:
    """Any array → one that the protocol can carry (C order, little-endian) and its datatype.

    Text, dates and objects of text or bytes become BYTES. Invalid for what has no datatype (complex numbers …).
    """
    import numpy as np

    if LITTLE and type(array) is np.ndarray and array.flags.c_contiguous and array.dtype.isnative:
        told = _told().get(array.dtype.char)
        if told is not None:
            return array, told
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    kind = array.dtype.kind
    if kind in "SUOMm":
        if kind in "Mm":
            array = array.astype(str)
        items = [_as_bytes(name, item) for item in array.ravel().tolist()]
        return objects(name, items, array.shape), "BYTES"
    dtype = array.dtype.newbyteorder("<")
    short = "?" if kind == "b" else f"{kind}{dtype.itemsize}"
    if short == "f16":
        dtype, short = np.dtype("<f8"), "f8"
    if short not in DATATYPES:
        raise bad(name, f"numpy's {array.dtype} has no datatype in the protocol")
    return array.astype(dtype, copy=False), DATATYPES[short]


def nested(array: Array) -> Any:
    """The array as nested lists of plain Python values, BYTES as text (what is not UTF-8: replaced)."""
    if array.dtype.kind != "O":
        return array.tolist()
    text = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    return objects("", text, array.shape).tolist()
