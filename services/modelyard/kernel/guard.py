"""Who may ask: host and origin checks, the bearer token, the service token, the types of bodies.

Two headers are believed only together with the service token: ``x-modelyard-workspace`` and what comes with it. The
service token opens everything, so one service may forward what it has let in.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import web

from ..core.errors import Denied, Invalid
from .bodies import JSON_TYPES, YAML_TYPES
from .forward import SERVICE_TOKEN, WORKSPACE

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
OPEN = frozenset({"/livez", "/readyz"})
INTERNAL = "/internal/"
PORTS = {"http": 80, "https": 443}
BYTES = "application/octet-stream"


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), secret.encode())


def _split(netloc: str) -> tuple[str, int | None] | None:
    try:
        parts = urlsplit(f"//{netloc}")
        return ((parts.hostname or "").rstrip("."), parts.port) if not parts.username else None
    except ValueError:
        return None


class Guard:
    """The rules of one server. ``hosts`` are the names it answers to (``*``: any); ``token`` None asks for none."""

    def __init__(self, hosts: Iterable[str] = LOCAL_HOSTS, *, token: str | None = None, service_token: str) -> None:
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts)
        self._token = token
        self._service_token = service_token

    def admit(self, request: web.Request) -> str:
        """The workspace of the caller. Raises Invalid (421, 415) and Denied (401, 403)."""
        self._host(request)
        self._origin(request)
        trusted = self._service(request)
        if not trusted and request.path.startswith(INTERNAL):
            raise Denied("routes under /internal are for services only (service token)")
        if not trusted and self._token is not None and request.path not in OPEN:
            self._bearer(request, self._token)
        _media_type(request)
        return request.headers.get(WORKSPACE, "default") if trusted else "default"

    def _known(self, host: str) -> bool:
        return "*" in self._hosts or host in self._hosts

    def _host(self, request: web.Request) -> None:
        hosts = request.headers.getall("Host", [])
        split = _split(hosts[0].lower()) if len(hosts) == 1 else None
        if split is None or not self._known(split[0]):
            raise Invalid(f"this server does not answer for the host '{', '.join(hosts)}'", code="misdirected")

    def _origin(self, request: web.Request) -> None:
        for origin in request.headers.getall("Origin", []):
            parts = urlsplit(origin.lower())
            here = _split(request.headers["Host"].lower())
            there = _split(parts.netloc)
            default = PORTS.get(parts.scheme)
            if (here is None or there is None or default is None or not self._known(there[0])
                    or (there[1] or default) != (here[1] or default)):
                raise Denied(f"requests from pages of another origin ('{origin}') are refused", code="foreign-origin")

    def _service(self, request: web.Request) -> bool:
        given = request.headers.get(SERVICE_TOKEN)
        if given is None:
            return False
        if not _same(given, self._service_token):
            raise Denied("the service token is not the one of this yard", code="bad-service-token",
                         help="Services of one yard share the file service.token of the data folder, or the setting "
                              "service_token (MODELYARD_SERVICE_TOKEN).")
        return True

    @staticmethod
    def _bearer(request: web.Request, token: str) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not _same(given.strip(), token):
            raise Denied("a valid bearer token is needed", code="unauthenticated")


def _media_type(request: web.Request) -> None:
    if not request.can_read_body:
        return
    given = request.headers.get("Content-Type")
    kind = request.content_type
    if given is None and request.method != "PUT":
        raise Invalid("the body has no content-type", code="unsupported-media-type")
    if given is not None and kind != BYTES and not JSON_TYPES.match(kind) and not YAML_TYPES.match(kind):
        raise Invalid(f"bodies of type '{kind}' are not read here", code="unsupported-media-type")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Invalid(f"bodies in '{request.charset}' are not read here; use UTF-8", code="unsupported-media-type")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Invalid("compressed bodies are not read here", code="unsupported-media-type")
