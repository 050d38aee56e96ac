"""Calls and answers: what transports hand to the data plane and get back.

The only place that maps outcomes to statuses. ``status`` is the gRPC status name on every protocol.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..core.errors import Invalid, ModelyardError, NotFound, TooLarge, Unavailable
from ..core.tensors import Tensor

if TYPE_CHECKING:
    from .heads import Head
    from .parts import Rows


class QueueFull(Unavailable):
    """So many calls wait already that this one was not taken in."""

    code = "queue-full"


class SpoolFull(QueueFull):
    """Calls must not go unrecorded, and there is no room to record one."""

    code = "spool-full"


class PastDeadline(ModelyardError):
    """The deadline passed before an answer was there."""

    code = "past-deadline"


class ScoringFailed(ModelyardError):
    """Scoring code raised; the message is the exception's own."""

    code = "scoring-failed"


class WrongRows(ScoringFailed):
    """What scoring code returned for several calls cannot be given back to them: all of them have failed."""


class UnknownEncoding(Invalid):
    """The body is packed in a way that is not known."""

    code = "unsupported-encoding"

    def __init__(self, encoding: str, known: Sequence[str]) -> None:
        super().__init__(f"bodies in the content encoding '{encoding}' are not taken; send {' or '.join(known)}, or "
                         "the plain bytes without Content-Encoding")


class TooSlow(PastDeadline):
    """The call did not come whole: nothing more of it came for as long as it may take."""


class Cancelled(ModelyardError):
    """The caller went away before its answer was there."""

    code = "cancelled"


STATUSES: tuple[tuple[type[ModelyardError], str, int], ...] = (
    (TooLarge, "RESOURCE_EXHAUSTED", 413),
    (QueueFull, "RESOURCE_EXHAUSTED", 503),
    (TooSlow, "DEADLINE_EXCEEDED", 408),
    (PastDeadline, "DEADLINE_EXCEEDED", 504),
    (ScoringFailed, "INTERNAL", 500),
    (Cancelled, "CANCELLED", 499),
    (Unavailable, "UNAVAILABLE", 503),
    (NotFound, "NOT_FOUND", 404),
    (UnknownEncoding, "INVALID_ARGUMENT", 415),
    (Invalid, "INVALID_ARGUMENT", 400),
    (ModelyardError, "INTERNAL", 500),
)
"""Error → gRPC status name and HTTP status; the first that fits."""


def statuses(error: ModelyardError) -> tuple[str, int]:
    """(gRPC status name, HTTP status) of an error."""
    return next((name, http) for type_, name, http in STATUSES if isinstance(error, type_))


def too_large(limit: int, size: int | None = None) -> TooLarge:
    """The error for a message over the limit, which it states."""
    given = f"{size} bytes are" if size is not None else "the message is"
    return TooLarge(f"{given} more than the limit of {limit} bytes (limits.max_message_bytes)", limit=limit)


@dataclass(slots=True)
class Asked:
    """One request, wire left behind. Either ``tensors`` or ``body`` (a plain JSON body, as it came) is there."""

    model: str = ""
    version: str = ""
    id: str = ""
    tensors: list[Tensor] | None = None
    body: bytes | None = None
    outputs: tuple[str, ...] = ()
    raw: bool = True
    wire: Any = None
    """The codec's own: what it needs to finish reading, and to answer in kind."""
    head: Head | None = None
    """What is known of requests that begin as this one does; ``wire`` is its bytes then."""


@dataclass(frozen=True, slots=True)
class Served:
    """Who answered: the name that was asked for, the version, and the model's id (``iris:4``)."""

    name: str
    version: str
    model: str


Writer = Callable[[Asked, int, int], tuple[bytes, str] | None]
"""As ``Codec.write``, of the rows from one number to another; None: this one is to be written by itself."""


class Codec(ABC):
    """Between wire bytes and ``Asked``, results and wire bytes. One for each protocol; keeps nothing of a call."""

    @abstractmethod
    def open(self, call: Call) -> Asked:
        """Reads as much as it takes to know who is asked. Raises Invalid: the call is refused."""

    @abstractmethod
    def read(self, asked: Asked) -> None:
        """Decodes the tensors (in the model's thread). Raises Invalid: the call fails."""

    @abstractmethod
    def write(self, asked: Asked, result: Any, served: Served) -> tuple[bytes, str]:
        """The answer's wire bytes and their content type; ``result`` as the runner returned it."""

    def writer(self, rows: Rows, served: Served) -> Writer | None:
        """What writes the answers that one prediction gave, for codecs that can do it faster than one by one."""
        return None

    def write_error(self, call: Call, error: ModelyardError) -> tuple[bytes, str]:
        """A failure's wire bytes; empty where the protocol carries it in headers."""
        return b"", ""


@dataclass(slots=True)
class Call:
    """One call as a transport received it. ``deadline`` is ``time.monotonic()`` seconds; inf: none given."""

    protocol: str  # grpc, rest, score, stream
    method: str
    body: bytes
    body_type: str
    codec: Codec
    model: str = ""
    version: str = ""
    deadline: float = math.inf
    request_id: str = ""
    trace_id: str = ""
    parent: str = ""
    """The caller's span, where it records this trace."""
    options: Any = None
    """What the codec must know beside the body (headers of the binary extension)."""
    key: str = ""
    """The header that ``Plane.sampling_header`` names."""


class Answer(Protocol):
    """What the transport sends. ``error`` is None when ``status`` is OK; ``model`` is "" of a refused call."""

    body: bytes
    body_type: str
    status: str
    request_id: str
    prediction_id: str
    model: str
    error: ModelyardError | None


class Plane(ABC):
    """What a transport needs of the data plane: nothing more, so that another transport can be added."""

    deployment: str

    @abstractmethod
    def submit(self, call: Call, done: Callable[[Answer], None]) -> Any:
        """Takes a call in; ``done`` is called once, in the event loop, after capture has the call (of a refused one
        at once, before this returns). Never raises. Calls of one turn of the loop may be answered together. Gives
        back what ``cancel`` takes."""

    @abstractmethod
    def cancel(self, submitted: Any) -> None:
        """The caller of a submitted call went away: what was not begun never runs. ``done`` is called all the same."""

    @abstractmethod
    async def handle(self, calls: Sequence[Call]) -> list[Answer]:
        """Answers every call, in order, after capture has them. Never raises but when it is cancelled."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Models are loaded and the server is not draining."""

    @property
    @abstractmethod
    def sampling_header(self) -> str:
        """The header, in lower case, that capture wants to know of every call as ``Call.key``; "" for none."""

    @property
    @abstractmethod
    def draining(self) -> bool:
        """Calls are still answered, but clients should go elsewhere."""
