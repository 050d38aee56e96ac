"""The one error tree. Every failure that crosses a room's door is one of these.

    ModelyardError
    ├── Invalid          the request or the event is wrong and will stay wrong
    │   └── TooLarge     more bytes than the limit that the message names
    ├── NotFound         no such thing in this workspace
    ├── Conflict         somebody else changed it first, or the name is taken (retryable by re-reading)
    ├── AlreadyApplied   this cause was handled before: nothing was changed
    ├── InUse            refused, because the things in ``blockers`` depend on it
    ├── Denied           the caller may not do this
    ├── Unavailable      a thing we depend on does not answer (retryable)
    └── BuildFailed      a build ended for a reason that its owner must fix

HTTP statuses live in ``kernel/web.py`` and gRPC statuses in ``scoring``: one table each.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ModelyardError(Exception):
    """Base of the tree. ``message`` says what is wrong and what to do; ``detail`` is for programs.

    ``code`` is the stable word that appears in problem+json; a subclass or a caller may narrow it
    (``Conflict("…", code="stale")``). ``retryable`` says whether the same call may succeed later.
    """

    code: str = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, **detail: Any) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        if code is not None:
            self.code = code


class Invalid(ModelyardError):
    """Wrong and will stay wrong. ``errors=[{"field", "message"}]`` lists every problem at once."""

    code = "invalid"


class TooLarge(Invalid):
    """Over a limit; the message states the limit."""

    code = "too-large"


class NotFound(ModelyardError):
    """No such thing."""

    code = "not-found"


class Conflict(ModelyardError):
    """A stale revision, a name that is taken, a generation below what runs."""

    code = "conflict"
    retryable = True


class AlreadyApplied(ModelyardError):
    """The cause given to ``commit`` was applied before; the document is as that commit left it."""

    code = "already-applied"


class InUse(ModelyardError):
    """Refused because of ``blockers=[{"kind", "id", "phase"}]``."""

    code = "in-use"


class Denied(ModelyardError):
    """No valid credentials, or not for this."""

    code = "denied"


class Unavailable(ModelyardError):
    """A dependency does not answer; ``retry_after`` (seconds) may be in ``detail``."""

    code = "unavailable"
    retryable = True


class BuildFailed(ModelyardError):
    """A build ended for a reason its owner must fix; the message names file and line where known."""

    code = "build-failed"
