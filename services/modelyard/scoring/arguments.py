"""What ``run(data)`` is given: its annotation decides.

| annotation | gets |
|---|---|
| ``np.ndarray`` | the one tensor, or ``{"data": …}`` as an array |
| ``pd.DataFrame`` | one tensor, several (a column each), ``{"data": rows, "columns": names}``, an object of columns |
| ``dict[str, np.ndarray]`` | the tensors by name, or an object of columns |
| ``str``, ``bytes``; none and named ``raw_data`` | the unparsed body |
| anything else, or none | the parsed JSON body |

Tensors stand for the JSON body ``{"data": nested list}`` (one) or ``{name: nested list}`` (several); one BYTES tensor
of one element with parameter ``content_type=application/json`` is the JSON body it holds.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from ..core.errors import Invalid
from ..core.inference import JSON
from ..core.numbers import numbers
from ..core.tensors import Tensor, nested
from .calls import Asked

if TYPE_CHECKING:
    import numpy as np

Build = Callable[[Asked], Any]


def builder(run: Callable[..., Any], name: str = "run", rows: bool = False) -> Build:
    """The function that makes ``run``'s argument. Raises Invalid when ``run`` cannot be called with one, or when it
    must take ``rows`` and wants the body unparsed."""
    build = _builder(run, name)
    if rows and build in (_text, _bytes, _text_or_element):
        raise Invalid(f"{name} takes rows of several calls, which an unparsed body has not: annotate np.ndarray, "
                      "pd.DataFrame or dict[str, np.ndarray], or take the parsed body (data)")
    return build


def _builder(run: Callable[..., Any], name: str) -> Build:
    try:
        parameters = list(inspect.signature(run).parameters.values())
    except (TypeError, ValueError):
        return _json
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    demanded = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not taken or len(demanded) > 1 or (demanded and demanded[0] is not taken[0]):
        raise Invalid(f"{name} must take one argument: def {name}(data)")
    return _for_annotation(_annotation(run, taken[0]), taken[0].name)


def _annotation(run: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    try:
        return typing.get_type_hints(run).get(parameter.name, parameter.empty)
    except Exception:  # noqa: BLE001 - user code's annotations may name anything; text is good enough then
        return parameter.annotation


def _for_annotation(annotation: Any, name: str) -> Build:
    if annotation is inspect.Parameter.empty:
        return _text if name == "raw_data" else _json
    if annotation is bytes:
        return _bytes
    if annotation is str:
        return _text_or_element
    origin = typing.get_origin(annotation) or annotation
    if _is(origin, "ndarray"):
        return _array
    if _is(origin, "DataFrame"):
        return frame
    arguments = typing.get_args(annotation)
    if origin in (dict, Mapping) and len(arguments) == 2 and _is(typing.get_origin(arguments[1]) or arguments[1],
                                                                "ndarray"):
        return _arrays
    return _json


def _is(annotation: Any, name: str) -> bool:
    """Whether an annotation is this class of numpy or pandas; neither is imported to find out."""
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] == name
    return getattr(annotation, "__name__", "") == name and \
        str(getattr(annotation, "__module__", "")).partition(".")[0] in ("numpy", "pandas")


def body_of(asked: Asked) -> bytes | None:
    """The JSON body as it came, also when it came inside a tensor; None when there are real tensors."""
    if asked.body is not None:
        return asked.body
    tensors = asked.tensors or []
    if len(tensors) == 1 and tensors[0].datatype == "BYTES" and tensors[0].array.size == 1 \
            and tensors[0].parameters.get("content_type") == JSON:
        return bytes(tensors[0].array.item())
    return None


def parse(body: bytes) -> Any:
    """Raises Invalid for what is not JSON."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Invalid(f"the body is not JSON: {exc}") from exc


def as_array(value: Any, what: str = "data") -> np.ndarray:
    """Nested lists → array. Raises Invalid for ragged or mixed ones."""
    import numpy as np

    found = numbers(value) if type(value) is list else None
    if found is not None:
        return _own(found)
    try:
        array = np.array(value)
    except (ValueError, TypeError, OverflowError) as exc:
        raise Invalid(f"'{what}' is not an array: {exc}") from exc
    if array.dtype.kind == "O":
        raise Invalid(f"'{what}' is not an array: it holds null, objects or numbers over 64 bits")
    return array


def data_of(document: Any) -> Any:
    """``{"data": x}`` → x; a bare list is taken as it is. Raises Invalid for anything else."""
    if isinstance(document, dict) and "data" in document:
        return document["data"]
    if isinstance(document, list):
        return document
    raise Invalid('the body must be {"data": …}')


def columns_of(document: Any) -> dict[str, Any]:
    """An object of columns, bare or under ``data``. Raises Invalid for anything else."""
    if isinstance(document, dict) and set(document) == {"data"} and isinstance(document["data"], dict):
        document = document["data"]
    if not isinstance(document, dict):
        raise Invalid("the body must be a JSON object of columns: {name: […], …}")
    return document


def _json(asked: Asked) -> Any:
    body = body_of(asked)
    if body is not None:
        return parse(body)
    tensors = asked.tensors or []
    if len(tensors) == 1:
        return {"data": nested(tensors[0].array)}
    return {t.name: nested(t.array) for t in tensors}


def _text(asked: Asked) -> str:
    try:
        return _raw(asked).decode()
    except UnicodeDecodeError as exc:
        raise Invalid(f"the body is not UTF-8 text: {exc}") from exc


def _raw(asked: Asked) -> bytes:
    body = body_of(asked)
    return orjson.dumps(_json(asked)) if body is None else body


def _bytes(asked: Asked) -> bytes:
    """The body; over tensors the only element of the only BYTES tensor (a picture, a document)."""
    element = _element(asked.tensors)
    return _raw(asked) if element is None else element


def _text_or_element(asked: Asked) -> str:
    element = _element(asked.tensors)
    try:
        return _text(asked) if element is None else element.decode()
    except UnicodeDecodeError as exc:
        raise Invalid(f"the element is not UTF-8 text: {exc}") from exc


def _element(tensors: list[Tensor] | None) -> bytes | None:
    if tensors is not None and len(tensors) == 1 and tensors[0].datatype == "BYTES" and tensors[0].array.size == 1:
        return bytes(tensors[0].array.item())
    return None


def _array(asked: Asked) -> np.ndarray:
    body = body_of(asked)
    if body is not None:
        return as_array(data_of(parse(body)))
    return _own(only(asked.tensors or []).array)


def only(tensors: list[Tensor]) -> Tensor:
    """The one tensor. Raises Invalid when there are more or none."""
    if len(tensors) != 1:
        raise Invalid(f"one input tensor is needed, not {len(tensors)}")
    return tensors[0]


def _own(array: np.ndarray) -> np.ndarray:
    """User code may write into what it is given; the request's bytes must stay as they came."""
    return array if array.flags.writeable else array.copy()


def _arrays(asked: Asked) -> dict[str, np.ndarray]:
    body = body_of(asked)
    if body is not None:
        return {str(name): as_array(value, str(name)) for name, value in columns_of(parse(body)).items()}
    return {t.name: _own(t.array) for t in asked.tensors or []}


def frame(asked: Asked) -> Any:
    """The call as a data frame. Raises Invalid."""
    import pandas as pd

    body = body_of(asked)
    try:
        if body is not None:
            return _frame_of(parse(body), pd)
        tensors = asked.tensors or []
        columns = {t.name: _column(t) for t in tensors if t.array.ndim < 2 or len(tensors) > 1}
        return pd.DataFrame(columns) if columns else pd.DataFrame(_text_cells(only(tensors).array))
    except (ValueError, TypeError) as exc:
        raise Invalid(f"the input is not a table: {exc}") from exc


def _frame_of(document: Any, pd: Any) -> Any:
    names = document.get("columns") if isinstance(document, dict) else None
    if isinstance(document, dict) and not isinstance(document.get("data"), (list, dict)):
        return pd.DataFrame(columns_of(document))
    data = data_of(document)
    if isinstance(data, dict) and set(document) > {"data", "columns", "index"}:
        data = document  # columns of which one is called data
    return pd.DataFrame(data, columns=names if isinstance(names, list) else None)


def _column(tensor: Tensor) -> np.ndarray:
    array = tensor.array
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise Invalid(f"tensor '{tensor.name}': a column has shape [n] or [n, 1], not {list(tensor.array.shape)}")
    return _text_cells(array)


def _text_cells(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "O":
        return _own(array)
    import numpy as np

    return np.array(nested(array), object).reshape(array.shape)


def text_of(name: str, array: np.ndarray) -> np.ndarray:
    """An array of text, or of text as bytes, as objects of ``str``; other objects as they are. Raises Invalid, naming
    the tensor, for bytes that are no UTF-8: a model must not be given other words than its caller sent."""
    import numpy as np

    try:
        flat = [value.decode() if isinstance(value, bytes) else value for value in array.ravel().tolist()]
    except UnicodeDecodeError as exc:
        raise Invalid(f"tensor '{name}': the model takes text in UTF-8, and this is not: {exc}") from exc
    return np.array(flat, object).reshape(array.shape)


def wrong_rows(name: str, rows: np.ndarray, features: int) -> Invalid:
    """The refusal of an array that has not so many columns."""
    return Invalid(f"tensor '{name}': the model takes rows of {features} numbers, shape [n, {features}]; it was given "
                   f"shape {list(rows.shape)}")
