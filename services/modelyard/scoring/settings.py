"""Settings of one scoring server process: its arguments and its environment. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.errors import Invalid
from .transport import Tls

TRANSPORTS = ("auto", "h2", "grpc")
DEFAULT_CAPTURE = {"enabled": False, "sampling": 1.0, "sampling_key": "prediction_id", "redact": [], "sync": "never",
                   "on_pressure": "drop", "spool_bytes": None, "retention_days": 30}


@dataclass(frozen=True)
class Limits:
    """What one replica accepts: milliseconds, calls, rows, bytes. As the deployment's ``limits``."""

    timeout_ms: int = 60_000
    max_queue: int = 512
    max_batch_rows: int = 64
    max_message_bytes: int = 67_108_864


@dataclass(frozen=True)
class Settings:
    """``grpc``, ``http`` and ``admin`` are ``host:port``, ``unix:PATH`` or ``fd://N``. ``replica`` is new at each
    start."""

    root: Path
    grpc: str = "0.0.0.0:8081"
    http: str = "0.0.0.0:8080"
    admin: str = "127.0.0.1:8082"
    transport: str = "auto"
    tls: Tls | None = None
    spool: Path | None = None
    deployment: str = ""
    workspace: str = "default"
    image: str = ""
    replica: str = "0-00000000"
    capture: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_CAPTURE))
    limits: Limits = field(default_factory=Limits)

    @property
    def image_version(self) -> str:
        """``iris-scorer:7`` → ``7``."""
        return self.image.rpartition(":")[2] if ":" in self.image else ""

    @classmethod
    def read(cls, argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Settings:
        """From the arguments behind ``serve`` and the environment. Raises Invalid, naming what is wrong."""
        args = _parser(env).parse_args(argv)
        ordinal = env.get("MODELYARD_REPLICA", "0")
        if not ordinal.isascii() or not ordinal.isdigit():
            raise Invalid(f"MODELYARD_REPLICA is '{ordinal}'; it must be a whole number")
        _check_numbers(env)
        limits = _json(env, "MODELYARD_LIMITS")
        known = {f.name for f in fields(Limits)}
        for name, value in limits.items():
            if name in known and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise Invalid(f"MODELYARD_LIMITS: {name} is {value!r}; it must be a whole number above 0")
        return cls(
            root=Path(env.get("MODELYARD_ROOT", "/opt/modelyard")), grpc=args.grpc, http=args.http, admin=args.admin,
            transport=_transport(args.transport), tls=_tls(args), spool=Path(args.spool) if args.spool else None,
            deployment=env.get("MODELYARD_DEPLOYMENT", ""), workspace=env.get("MODELYARD_WORKSPACE", "default"),
            image=env.get("MODELYARD_IMAGE", ""),
            replica=f"{int(ordinal)}-{secrets.token_hex(4)}",
            capture={**DEFAULT_CAPTURE, **_json(env, "MODELYARD_CAPTURE")},
            limits=Limits(**{k: v for k, v in limits.items() if k in known}))


def _check_numbers(env: Mapping[str, str]) -> None:
    """Looks at the numbers that others read where they need them: a start must not end in a traceback, nor a wish be
    passed over."""
    for name in ("MODELYARD_THREADS", "MODELYARD_SPOOL_BYTES"):
        given = env.get(name, "")
        if given and not (given.isascii() and given.isdigit() and int(given) > 0):
            raise Invalid(f"{name} is '{given}'; it must be a whole number above 0")
    given = env.get("MODELYARD_STUCK_S", "")
    try:
        fits = not given or float(given) >= 0
    except ValueError:
        fits = False
    if not fits:
        raise Invalid(f"MODELYARD_STUCK_S is '{given}'; it must be a number of seconds")


def _transport(given: str) -> str:
    if given not in TRANSPORTS:
        raise Invalid(f"there is no transport '{given}' (--transport, MODELYARD_TRANSPORT); use one of "
                      f"{', '.join(TRANSPORTS)}")
    return given


def _tls(args: argparse.Namespace) -> Tls | None:
    given = [Path(name) if name else None for name in (args.tls_cert, args.tls_key, args.tls_client_ca)]
    cert, key, client_ca = given
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise Invalid("TLS needs --tls-cert and --tls-key together")
    tls = Tls(cert, key, client_ca)
    tls.check()
    return tls


def _parser(env: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve", description="Answer scoring calls. "
                                     "ADDR is host:port, unix:PATH or fd://N, an inherited socket.")
    parser.add_argument("--grpc", default=Settings.grpc, metavar="ADDR", help="Open Inference Protocol v2 over gRPC")
    parser.add_argument("--http", default=Settings.http, metavar="ADDR", help="the same over REST, /score, /metrics")
    parser.add_argument("--admin", default=Settings.admin, metavar="ADDR", help="/livez /readyz /metrics, POST /drain")
    parser.add_argument("--transport", default=env.get("MODELYARD_TRANSPORT") or "auto", metavar="NAME",
                        help="gRPC by h2 (h2corn) or grpc (grpcio, and REST by aiohttp alone); auto: h2 where it is "
                             "installed")
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="certificate chain, PEM: gRPC and REST by TLS")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="its key, PEM")
    parser.add_argument("--tls-client-ca", default="", metavar="FILE", help="callers must show a certificate of these")
    parser.add_argument("--spool", default="", metavar="DIR", help="where captured calls are kept until shipped")
    return parser


def _json(env: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(env.get(name) or "{}")
    except ValueError as exc:
        raise Invalid(f"{name} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise Invalid(f"{name} must be a JSON object")
    return found
