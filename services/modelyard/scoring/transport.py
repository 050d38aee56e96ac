"""What every transport is: it listens, hands calls to the plane, and goes away without losing one."""

from __future__ import annotations

import os
import re
import socket
import stat
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import Invalid

if TYPE_CHECKING:
    import ssl

REQUEST_ID_LENGTH = 128
TRACEPARENT = re.compile(r"([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
BACKLOG = 4096
CONNECTION_AGE_S = 5.0
"""grpcio tells its clients to come again after this long."""


@dataclass(frozen=True)
class Tls:
    """PEM files. With ``client_ca`` a caller must show a certificate that one of its authorities signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Raises Invalid, which names the file that cannot be used, and why. No library under a transport does."""
        import ssl

        for flag, path in (("--tls-cert", self.cert), ("--tls-key", self.key), ("--tls-client-ca", self.client_ca)):
            if path is not None:
                _readable(flag, path)
        for flag, path in (("--tls-cert", self.cert), ("--tls-client-ca", self.client_ca)):
            try:
                if path is not None:
                    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
            except ssl.SSLError as exc:
                raise Invalid(f"{path} ({flag}) is no certificate in PEM: {_said(exc)}") from exc
        locked = []

        def passphrase() -> str:
            locked.append(self.key)
            return "none"

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, passphrase)
        except ssl.SSLError as exc:
            if locked:
                raise Invalid(f"{self.key} (--tls-key) is locked by a passphrase, which nobody can give here; write "
                              "the key without one") from exc
            if exc.reason == "KEY_VALUES_MISMATCH":
                raise Invalid(f"{self.key} (--tls-key) is not the key of {self.cert} (--tls-cert)") from exc
            raise Invalid(f"{self.key} (--tls-key) is no key in PEM: {_said(exc)}") from exc

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """(certificate chain, key, authorities). Raises OSError."""
        return self.cert.read_bytes(), self.key.read_bytes(), self.client_ca.read_bytes() if self.client_ca else None

    def context(self) -> ssl.SSLContext:
        """For servers that take Python's own TLS. Raises OSError."""
        import ssl

        made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.client_ca)
        made.load_cert_chain(self.cert, self.key)
        if self.client_ca is not None:
            made.verify_mode = ssl.CERT_REQUIRED
        return made


def _readable(flag: str, path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError as exc:
        raise Invalid(f"{path} is not there ({flag})") from exc
    except OSError as exc:
        raise Invalid(f"{path} ({flag}) cannot be read: {exc.strerror}") from exc


def _said(exc: ssl.SSLError) -> str:
    """OpenSSL's reason in words; of Python's own line, which names a place in C, nothing else."""
    return (exc.reason or "it cannot be read").lower().replace("_", " ")


class Transport(ABC):
    """One listening address and one protocol. ``address`` is ``host:port``, ``unix:PATH`` or ``fd://N``."""

    name: ClassVar[str]
    library: ClassVar[str]
    """What it is built on, for the log."""

    @abstractmethod
    async def start(self) -> str:
        """Listens; gives back the address with the port it got. Raises OSError when it cannot."""

    @abstractmethod
    async def loaded(self) -> None:
        """The models are loaded: say ready."""

    @abstractmethod
    async def drain(self) -> None:
        """Say not ready; go on answering; let connections end by themselves."""

    async def spread(self) -> None:  # noqa: B027 - not every protocol needs it
        """There are replicas now that were not there before: send connections on to them, failing no call."""

    @abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Takes nothing new, answers what is in flight for up to ``grace_s``, closes."""


def parse_address(address: str) -> tuple[str, int] | str | int:
    """``host:port`` → (host, port), ``unix:PATH`` → PATH, ``fd://N`` → N. Raises Invalid."""
    if address.startswith("unix:") and len(address) > 5:
        return address[5:]
    if address.startswith("fd://") and address[5:].isascii() and address[5:].isdigit():
        return int(address[5:])
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Invalid(f"'{address}' is not an address; write host:port, unix:PATH or fd://N (an inherited socket)")
    return host.strip("[]"), int(port)


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket, and its address with the port it got. Raises Invalid, OSError."""
    target = parse_address(address)
    try:
        if isinstance(target, int):
            return _inherited(target), address
        if isinstance(target, str):
            clear_socket(target)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(target)
            sock.listen(BACKLOG)
            return sock, address
        six = ":" in target[0]
        sock = socket.create_server(target, family=socket.AF_INET6 if six else socket.AF_INET, backlog=BACKLOG,
                                    dualstack_ipv6=six and socket.has_dualstack_ipv6())
    except OSError as exc:
        raise OSError(f"cannot listen on {address}: {exc}") from exc
    return sock, f"{target[0]}:{sock.getsockname()[1]}"


def _inherited(number: int) -> socket.socket:
    """Our own copy of a socket that whoever started us has opened; theirs stays as it is. Raises OSError."""
    sock = socket.socket(fileno=os.dup(number))
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise OSError("it is not a listening stream socket")
    sock.setblocking(False)
    return sock


def clear_socket(path: str) -> None:
    """Removes what an earlier process left: a socket, nothing else."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def request_id(given: str | None) -> str:
    """The caller's id if it is printable ASCII of a sane length, else "" (one is made)."""
    return given if given and len(given) <= REQUEST_ID_LENGTH and given.isascii() and given.isprintable() else ""


def trace(traceparent: str | None) -> tuple[str, str]:
    """The trace id of a W3C ``traceparent``, and the caller's span where it records the trace; "" for what is not."""
    found = TRACEPARENT.match(traceparent) if traceparent else None
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return "", ""
    return found[2], found[3] if int(found[4], 16) & 1 else ""


def binary_trace(packed: bytes | None) -> tuple[str, str]:
    """The same of a ``grpc-trace-bin``: version 0, then trace id, span and options, each behind its number."""
    if not packed or len(packed) < 18 or packed[:2] != b"\0\0":
        return "", ""
    recorded = len(packed) >= 29 and packed[18] == 1 and packed[27] == 2 and packed[28] & 1
    return packed[2:18].hex(), packed[19:27].hex() if recorded else ""
