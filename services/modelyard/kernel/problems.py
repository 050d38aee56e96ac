"""The error tree over HTTP: one table out (problem+json, RFC 9457) and one table back in (what a peer answered)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from ..core.errors import (
    AlreadyApplied,
    BuildFailed,
    Conflict,
    Denied,
    InUse,
    Invalid,
    ModelyardError,
    NotFound,
    TooLarge,
    Unavailable,
)

PROBLEM = "application/problem+json"
BY_CODE: dict[str, int] = {
    "malformed": 400,
    "unauthenticated": 401,
    "method-not-allowed": 405,
    "stale": 412,
    "unsupported-media-type": 415,
    "misdirected": 421,
    "head-too-large": 431,
    "internal": 500,
    "misrouted": 502,
}
BY_CLASS: tuple[tuple[type[ModelyardError], int], ...] = (
    (TooLarge, 413), (Invalid, 422), (NotFound, 404), (Conflict, 409), (AlreadyApplied, 409), (InUse, 412),
    (Denied, 403), (Unavailable, 503), (BuildFailed, 422),
)
TITLES = {
    400: "The request cannot be read", 401: "Credentials are needed", 403: "Not allowed", 404: "Not found",
    405: "Method not allowed", 409: "In conflict with what is there", 412: "A precondition does not hold",
    413: "Too large", 415: "Unsupported media type", 421: "Not a host of this server",
    422: "The request is not valid", 431: "The head is too large",
    500: "Something went wrong here", 502: "The owner of this route cannot be found", 503: "Not available now",
}
HELP = {
    "stale": "Read it again, apply your change to the newest version, and send its ETag in If-Match.",
    "in-use": "Delete or change the things listed in `blockers` first.",
    "in-flight": "The first request with this Idempotency-Key is still being handled; repeat this one in a moment.",
    "idempotency-key-reused": "Use a new Idempotency-Key for a different request.",
    "unsupported-media-type": "Send `content-type: application/json` or `application/yaml`, and "
                              "`application/octet-stream` for bytes.",
    "misdirected": "Use an address of this server, or add the host to `allowed_hosts` (MODELYARD_ALLOWED_HOSTS).",
    "unauthenticated": "Send `authorization: Bearer TOKEN` (MODELYARD_TOKEN for the SDK and the command line).",
    "unavailable": "Repeat the request after the seconds given in Retry-After.",
    "misrouted": "Check `services` in the settings: each service's URL must lead to that service.",
    "internal": "The server's log has the reason under this request_id.",
}
RESERVED = frozenset({"type", "title", "status", "code", "detail", "errors", "help", "request_id"})


def status_of(exc: ModelyardError) -> int:
    """The HTTP status of an error: by its code where that narrows, else by its class."""
    if exc.code in BY_CODE:
        return BY_CODE[exc.code]
    return next((status for type_, status in BY_CLASS if isinstance(exc, type_)), 500)


def _errors(detail: Mapping[str, Any], message: str) -> list[dict[str, Any]]:
    if isinstance(detail.get("errors"), list):
        return list(detail["errors"])
    return [{"field": detail["field"], "message": message}] if "field" in detail else []


def problem(exc: ModelyardError, request_id: str = "") -> dict[str, Any]:
    """The body of the answer: type, title, status, code, detail, errors, help, request_id and what ``detail`` adds."""
    status = status_of(exc)
    body: dict[str, Any] = {
        "type": f"urn:modelyard:problem:{exc.code}", "title": TITLES.get(status, "Error"), "status": status,
        "code": exc.code, "detail": exc.message, "errors": _errors(exc.detail, exc.message),
        "help": exc.detail.get("help") or HELP.get(exc.code, ""), "request_id": request_id,
    }
    return body | {k: v for k, v in exc.detail.items() if k not in RESERVED and k != "field"}


def answer(exc: ModelyardError, request_id: str = "") -> web.Response:
    """The answer to a failed request."""
    body = problem(exc, request_id)
    headers: dict[str, str] = {}
    if body["status"] == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="modelyard"'
    if body["status"] == 503 or "retry_after" in exc.detail:
        headers["Retry-After"] = str(max(1, round(float(exc.detail.get("retry_after", 1)))))
    if body["status"] == 405 and "allow" in exc.detail:
        headers["Allow"] = ", ".join(body.pop("allow"))
    return web.Response(status=body["status"], body=orjson.dumps(body, default=str), content_type=PROBLEM,
                        headers=headers)


CLASSES: dict[int, type[ModelyardError]] = {
    400: Invalid, 415: Invalid, 421: Invalid, 422: Invalid, 401: Denied, 403: Denied, 404: NotFound, 405: Invalid,
    409: Conflict, 412: Conflict, 413: TooLarge, 431: Invalid,
}


def error_from(status: int, body: Any, where: str) -> ModelyardError:
    """What a peer answered, as one of ours: class by code, else by status; ``where`` names the peer."""
    if not isinstance(body, dict) or not isinstance(body.get("code"), str):
        return CLASSES.get(status, Unavailable)(f"{where} answered {status}", upstream_status=status)
    code = body["code"]
    by_code = {type_.code: type_ for type_, _ in BY_CLASS}
    type_ = by_code.get(code) or CLASSES.get(status, Unavailable)
    extra = {k: v for k, v in body.items() if k not in RESERVED}
    if body.get("errors"):
        extra["errors"] = body["errors"]
    if body.get("help"):
        extra["help"] = body["help"]
    return type_(str(body.get("detail") or f"{where} answered {status}"), code=code, **extra)
