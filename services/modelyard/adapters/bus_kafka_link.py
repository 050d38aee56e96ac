"""Where a Kafka is and how to reach it: the URL read once, what each client is opened with, and errors made ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from aiokafka import errors
from aiokafka.conn import create_conn
from aiokafka.helpers import create_ssl_context

from ..core.errors import Invalid, Unavailable

PORT = 9092
CONNECT_S = 5.0
"""So long may a broker take to answer the first question."""
BACKOFF_MS = 50
AGAIN_S = 0.5
PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,99}")
DENIED = (errors.TopicAuthorizationFailedError, errors.GroupAuthorizationFailedError,
          errors.ClusterAuthorizationFailedError)
PASSWORD = (errors.AuthenticationFailedError, errors.SaslAuthenticationFailed,
            errors.AuthenticationMethodNotSupported, errors.IllegalSaslStateError,
            errors.UnsupportedSaslMechanismError)
FAILURES = (errors.KafkaError, OSError, TimeoutError)
"""What a client raises when a broker does not do what it was asked."""

# Every retry of the driver is a line at ERROR; what it comes to is said once, by whoever waits for it.
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


@dataclass
class Attempt:
    """Many callers, one attempt: who waited for one that failed is told so, instead of trying one after another."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _failed_at: float = float("-inf")
    _failure: Unavailable | None = None

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Raises at once what the last attempt raised, within ``AGAIN_S`` of it."""
        async with self.lock:
            if self._failure is not None and time.monotonic() < self._failed_at + AGAIN_S:
                raise Unavailable(self._failure.message, code=self._failure.code)
            try:
                yield
            except Unavailable as exc:
                self._failed_at, self._failure = time.monotonic(), exc
                raise


@dataclass(frozen=True)
class Link:
    """Hosts, credentials and the prefix that all names in this Kafka get (``yard`` → topic ``yard.image.built``)."""

    hosts: tuple[str, ...]
    prefix: str = ""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    protocol: str = "PLAINTEXT"
    mechanism: str = "PLAIN"
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @classmethod
    async def of(cls, url: str, security_protocol: str | None = None, sasl_mechanism: str | None = None,
                 cafile: str | None = None) -> Link:
        """Raises Invalid, saying what is wrong in the URL and never showing a credential. Connects to nothing."""
        try:
            parts = urlsplit(url)
        except ValueError as exc:
            raise Invalid("bus: this is not a Kafka URL; write kafka://HOST:PORT[,HOST:PORT…][/PREFIX]",
                          field="bus") from exc
        login, _, places = parts.netloc.rpartition("@")
        user, _, password = login.partition(":")
        prefix = unquote(parts.path).strip("/")
        if prefix and not NAME.fullmatch(prefix):
            raise Invalid(f"bus: the prefix '{prefix[:40]}' must be letters, digits, '.' and '-'", field="bus")
        protocol = (security_protocol or ("SASL_PLAINTEXT" if user else "SSL" if cafile else "PLAINTEXT")).upper()
        mechanism = (sasl_mechanism or "PLAIN").upper()
        _known("security_protocol", protocol, PROTOCOLS)
        _known("sasl_mechanism", mechanism, MECHANISMS)
        if protocol.startswith("SASL") and not (user and password):
            raise Invalid(f"bus: {protocol} needs a user and a password: kafka://USER:PASSWORD@HOST:PORT", field="bus")
        tls = await _tls(cafile) if protocol.endswith("SSL") else None
        hosts = tuple(_host(place) for place in places.split(","))
        return cls(hosts, prefix, unquote(user) or None, unquote(password) or None, protocol, mechanism, tls)

    def name(self, plain: str) -> str:
        """How a topic or a group is called in this Kafka. Raises Invalid for a name that Kafka would not take."""
        if not NAME.fullmatch(plain):
            raise Invalid(f"'{plain[:40]}' is no name for a topic: letters, digits, '.' and '-' are")
        return f"{self.prefix}.{plain}" if self.prefix else plain

    def client(self, request_s: float = 10.0) -> dict[str, Any]:
        """What every client of the driver is opened with. (``api_version`` is never given: C10.)"""
        return {"bootstrap_servers": list(self.hosts), "client_id": "modelyard", "metadata_max_age_ms": 60_000,
                "retry_backoff_ms": BACKOFF_MS, "request_timeout_ms": int(request_s * 1000), **self._security()}

    def _security(self) -> dict[str, Any]:
        given: dict[str, Any] = {"security_protocol": self.protocol, "ssl_context": self.tls}
        if self.protocol.startswith("SASL"):
            given |= {"sasl_mechanism": self.mechanism, "sasl_plain_username": self.user,
                      "sasl_plain_password": self.password}
        return given

    @contextlib.contextmanager
    def door(self, doing: str) -> Iterator[None]:
        """What the driver raises inside becomes Unavailable: ``doing`` says what did not work."""
        try:
            yield
        except FAILURES as exc:
            raise self.ours(exc, doing) from exc

    def ours(self, exc: BaseException, doing: str) -> Unavailable:
        """The error in our words: what did not work, why, and what to do."""
        place = ",".join(self.hosts)
        if isinstance(exc, DENIED):
            return Unavailable(f"{doing}: Kafka at {place} does not permit it ({exc}); grant "
                               f"{self.user or 'the anonymous user'} Read, Write, Create and Describe on topics and "
                               "groups", code="denied")
        if isinstance(exc, PASSWORD):
            return Unavailable(f"{doing}: Kafka at {place} refuses the credentials; correct user, password or "
                               f"sasl_mechanism in bus= ({exc})", code="denied")
        if isinstance(exc, ssl.SSLError):
            return Unavailable(f"{doing}: Kafka at {place} and this machine do not agree on TLS; set cafile= to its "
                               f"authority, or security_protocol= ({exc})")
        if isinstance(exc, TimeoutError | errors.KafkaTimeoutError | errors.RequestTimedOutError):
            return Unavailable(f"{doing}: Kafka at {place} does not answer in time; is it running and reachable?")
        if isinstance(exc, OSError | errors.KafkaConnectionError):
            return Unavailable(f"{doing}: no Kafka broker answers at {place}; start it, or correct bus= ({exc})")
        return Unavailable(f"{doing}: Kafka at {place} answers {type(exc).__name__}: {exc}")

    def no_topics(self, names: Sequence[str], partitions: int) -> Unavailable:
        """Topics that are not there, and that this user may not make."""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return Unavailable(f"the topics {', '.join(names[:3])}{more} are missing in Kafka at {','.join(self.hosts)}, "
                           f"and {self.user or 'the anonymous user'} may not make them: grant Create on topics, or "
                           f"make them with {partitions} partitions each", code="denied")

    async def why(self, exc: BaseException, doing: str) -> Unavailable:
        """Like ``ours``; where the driver only says that no host would do, the hosts are asked for the reason."""
        if not isinstance(exc, errors.KafkaConnectionError):
            return self.ours(exc, doing)
        for place in self.hosts:
            host, _, port = place.rpartition(":")
            try:
                async with asyncio.timeout(CONNECT_S):
                    connection = await create_conn(host.strip("[]"), int(port), **self._security())
                connection.close()
            except FAILURES as reason:
                return self.ours(reason, doing)
        return Unavailable(f"{doing}: Kafka at {','.join(self.hosts)} accepts the connection and hangs up; if it asks "
                           "for a password or TLS, write kafka://USER:PASSWORD@HOST:PORT or set security_protocol=")


async def _tls(cafile: str | None) -> ssl.SSLContext:
    try:
        return await asyncio.to_thread(create_ssl_context, cafile=cafile)
    except OSError as exc:
        raise Invalid(f"bus: cafile={cafile} cannot be read: {exc}", field="bus") from exc


def _known(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise Invalid(f"bus: {option}={given[:40]} is unknown; known: {', '.join(known)}", field="bus")


def _host(place: str) -> str:
    """``HOST:PORT``; Kafka's own port when none is given."""
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise Invalid(f"bus: '{place[:60]}' is not HOST:PORT", field="bus") from exc
    if not host:
        raise Invalid("bus: a Kafka URL names a host: kafka://HOST:PORT[,HOST:PORT…][/PREFIX]", field="bus")
    return f"[{host}]:{port or PORT}" if ":" in host else f"{host}:{port or PORT}"
