"""REST itself, whatever carries it: routes, headers, problem documents. Open Inference Protocol v2, ``/score`` and its
companions, metrics.

A carrier finds the route of a request, and either has a reply at once (``tell``), or later (``work``), or a call for
the plane (``ask``), whose answer becomes the reply (``answered``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote

import orjson

from ..core.errors import Invalid, ModelyardError, NotFound
from ..core.inference import BINARY, JSON
from ..core.version import __version__
from . import metrics
from .calls import Answer, Call, Codec, statuses
from .codecs import PROBLEM, RestCodec, ScoreCodec, problem
from .dataplane import DataPlane
from .image import Slot
from .swagger import describe
from .transport import request_id, trace

HEADER_LENGTH = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
TEXT = "text/plain; charset=utf-8"
SERVER = "modelyard"
"""As every answer calls us."""
Headers = Mapping[str, str]
"""Looked up by names in lower case."""


@dataclass(slots=True)
class Reply:
    """``head``: header lines, each with its line end; those of the connection are the carrier's."""

    status: int
    head: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """What answers a request: one of the three."""

    tell: Callable[[Found, str], Reply] | None = None
    ask: Callable[[Found, Headers, bytes], Call] | None = None
    work: Callable[[], Awaitable[Reply]] | None = None
    model: str = ""
    version: str = ""


class Site:
    """The routes over a plane."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._rest, self._score = RestCodec(), ScoreCodec()
        self.find = lru_cache(1024)(self._find)
        """The route of a method and a path as it came, without the query."""
        self._plain: dict[str, Found] = {
            "/": Found(self._healthy), "/score": Found(ask=self._ask_score), "/swagger.json": Found(self._swagger),
            "/metrics": Found(lambda found, query: exposition(plane)), "/v2": Found(self._server_metadata),
            "/v2/health/live": Found(lambda found, query: told({"live": True})),
            "/v2/health/ready": Found(self._ready)}
        self._of_models = {"": Found(self._model_metadata), "ready": Found(self._model_ready),
                           "infer": Found(ask=self._ask_infer)}

    def _find(self, method: str, path: str) -> Found:
        found = self._plain.get(path) or self._of_model(path)
        if found is None:
            return _refusing(404)
        allowed = ("GET", "HEAD") if found.tell is not None else ("POST",)
        return found if method in allowed else _refusing(405, ",".join(allowed))

    def _of_model(self, path: str) -> Found | None:
        """``/v2/models/{model}[/versions/{version}][/ready|/infer]``."""
        parts = [unquote(part) for part in path.split("/")]
        if parts[:3] != ["", "v2", "models"] or not all(parts[3:]) or len(parts) not in (4, 5, 6, 7):
            return None
        version, rest = (parts[5], parts[6:]) if len(parts) > 5 and parts[4] == "versions" else ("", parts[4:])
        found = self._of_models.get("/".join(rest))
        return None if found is None else replace(found, model=parts[3], version=version)

    def tell(self, found: Found, headers: Headers, query: str = "") -> Reply:
        """The reply of a route that has one at once."""
        assert found.tell is not None
        try:
            return found.tell(found, query)
        except ModelyardError as exc:
            return self.failed(exc, headers, scoring=False)

    def failed(self, error: ModelyardError, headers: Headers, scoring: bool = True) -> Reply:
        """For a request that never became a call; ``scoring``: it was to become one."""
        self._plane.refused("rest", error, scoring)
        return Reply(statuses(error)[1], f"Content-Type: {PROBLEM}\r\n{_retry(error)}",
                     problem(error, request_id(headers.get("x-request-id"))))

    def unread(self, status: int, why: str) -> Reply:
        """For what cannot be read as a request; of whom it was, and of what, nobody knows."""
        error = Invalid(why) if status < 500 else ModelyardError(why)
        self._plane.refused("rest", error, scoring=False)
        return refusal(status, why)

    def answered(self, answer: Answer) -> Reply:
        """For a call that the plane has answered, well or not."""
        before, between, length = _constant(answer.body_type, answer.model, self._plane.deployment)
        head = f"{before}{answer.request_id}{between}{answer.prediction_id}{length}"
        if answer.error is None:
            return Reply(200, head, answer.body)
        return Reply(statuses(answer.error)[1], head + _retry(answer.error), answer.body)

    def _ask_infer(self, found: Found, headers: Headers, body: bytes) -> Call:
        given, length, kind = headers.get(HEADER_LENGTH), None, JSON
        if given is not None:
            if not (given.isascii() and given.isdigit()):
                raise Invalid("Inference-Header-Content-Length must be a whole number")
            length = int(given)
            kind = f"{BINARY}; header-length={length}"
        call = self._call("rest", "ModelInfer", body, kind, self._rest, headers)
        call.model, call.version, call.options = found.model, found.version, length
        return call

    def _ask_score(self, found: Found, headers: Headers, body: bytes) -> Call:
        return self._call("score", "score", body, headers.get("content-type", JSON), self._score, headers)

    def _call(self, protocol: str, method: str, body: bytes, kind: str, codec: Codec, headers: Headers) -> Call:
        key = self._plane.sampling_header
        traced, parent = trace(headers.get("traceparent"))
        return Call(protocol, method, body, kind, codec, request_id=request_id(headers.get("x-request-id")),
                    trace_id=traced, parent=parent, key=headers.get(key, "") if key else "")

    def _healthy(self, found: Found, query: str) -> Reply:
        ready = self._plane.ready
        return Reply(200 if ready else 503, f"Content-Type: {TEXT}\r\n", b"Healthy" if ready else b"Not ready")

    def _ready(self, found: Found, query: str) -> Reply:
        return told({"ready": self._plane.ready}, 200 if self._plane.ready else 503)

    def _server_metadata(self, found: Found, query: str) -> Reply:
        return told({"name": "modelyard", "version": __version__, "extensions": EXTENSIONS})

    def _model_ready(self, found: Found, query: str) -> Reply:
        self._plane.about(found.model, found.version)
        return told({"name": found.model, "ready": self._plane.ready}, 200 if self._plane.ready else 503)

    def _model_metadata(self, found: Found, query: str) -> Reply:
        _, runner = self._plane.about(found.model, found.version)
        return told({"name": found.model, "versions": self._plane.table.versions(found.model),
                      "platform": runner.platform, "inputs": _slots(runner.inputs), "outputs": _slots(runner.outputs)})

    def _swagger(self, found: Found, query: str) -> Reply:
        version = next((value for name, value in parse_qsl(query, keep_blank_values=True) if name == "version"), "2")
        if version not in ("2", "3"):
            raise NotFound(f"there is no swagger of version '{version}'; ask for 2 or 3")
        default = self._plane.table.default
        runner = self._plane.about(default)[1] if default else None
        return told(describe(self._plane.deployment, runner, int(version)))


def refusal(status: int, why: str = "", allow: str = "") -> Reply:
    """For a request that is none of ours."""
    reason = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": reason, "status": status, "detail": why or reason,
            "code": reason.lower().replace(" ", "-"), "error": why or reason}
    return Reply(status, f"Content-Type: {PROBLEM}\r\n" + (f"Allow: {allow}\r\n" if allow else ""), orjson.dumps(body))


def exposition(plane: DataPlane) -> Reply:
    """The plane's metrics in Prometheus' text format."""
    return Reply(200, f"Content-Type: {metrics.CONTENT_TYPE}\r\n", plane.metrics.text())


def _refusing(status: int, allow: str = "") -> Found:
    return Found(lambda found, query: refusal(status, allow=allow))


@lru_cache(1024)
def _constant(body_type: str, model: str, deployment: str) -> tuple[str, str, str]:
    """An answer's header lines but for the two ids: what stands before, between and behind them."""
    kind, _, length = body_type.partition("; header-length=")
    return (f"Content-Type: {kind}\r\nx-request-id: ",
            f"\r\nx-modelyard-model: {model}\r\nx-modelyard-deployment: {deployment}\r\nx-modelyard-prediction-id: ",
            f"\r\nInference-Header-Content-Length: {length}\r\n" if length else "\r\n")


def told(body: Any, status: int = 200) -> Reply:
    """JSON."""
    return Reply(status, f"Content-Type: {JSON}\r\n", orjson.dumps(body))


def _slots(slots: tuple[Slot, ...]) -> list[dict[str, Any]]:
    return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in slots]


def _retry(error: ModelyardError) -> str:
    seconds = error.detail.get("retry_after")
    return "" if seconds is None else f"Retry-After: {seconds}\r\n"
