"""What a server said went wrong, as one of the errors of ``core/errors.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..core import errors
from ..core.errors import ModelyardError

BY_STATUS: dict[int, type[ModelyardError]] = {
    400: errors.Invalid, 401: errors.Denied, 403: errors.Denied, 404: errors.NotFound, 409: errors.Conflict,
    412: errors.Conflict, 413: errors.TooLarge, 415: errors.Invalid, 421: errors.Denied, 422: errors.Invalid,
    502: errors.Unavailable, 503: errors.Unavailable, 504: errors.Unavailable,
}
NOT_DETAIL = frozenset({"type", "title", "status", "detail", "code", "instance"})


def _tree(root: type[ModelyardError]) -> Iterator[type[ModelyardError]]:
    yield root
    for branch in root.__subclasses__():
        yield from _tree(branch)


BY_CODE = {cls.code: cls for cls in _tree(ModelyardError)}


def from_problem(status: int, problem: dict[str, Any], retry_after: str | None = None) -> ModelyardError:
    """The error for an answer of ``status`` with the body ``problem`` (problem+json, or empty).

    The problem's ``code`` decides the class, then the status; what else the body holds (``errors``,
    ``blockers``, ``help``) becomes ``detail``.
    """
    code = str(problem.get("code") or "")
    cls = BY_CODE.get(code) or BY_STATUS.get(status, ModelyardError)
    detail = {k: v for k, v in problem.items() if k not in NOT_DETAIL and k not in ("message", "self")}
    if retry_after is not None and retry_after.isdigit():
        detail["retry_after"] = int(retry_after)
    message = str(problem.get("detail") or problem.get("title") or f"the server answered {status}")
    return cls(message, code=code or None, status=status, **detail)
