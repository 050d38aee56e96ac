"""What every transport is: it listens, hands calls to the plane, and goes away without losing one."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import ClassVar

from ..core.errors import Invalid

REQUEST_ID_LENGTH = 128


class Transport(ABC):
    """One listening address and one protocol. ``address`` is ``host:port`` or ``unix:PATH``."""

    name: ClassVar[str]

    @abstractmethod
    async def start(self) -> str:
        """Listens; gives back the address with the port it got. Raises OSError when it cannot."""

    @abstractmethod
    async def loaded(self) -> None:
        """The models are loaded: say ready."""

    @abstractmethod
    async def drain(self) -> None:
        """Say not ready; go on answering; let connections end by themselves."""

    @abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Takes nothing new, answers what is in flight for up to ``grace_s``, closes."""


def parse_address(address: str) -> tuple[str, int] | str:
    """``host:port`` → (host, port), ``unix:PATH`` → PATH. Raises Invalid."""
    if address.startswith("unix:") and len(address) > 5:
        return address[5:]
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Invalid(f"'{address}' is not an address; write host:port or unix:PATH")
    return host.strip("[]"), int(port)


def clear_socket(path: str) -> None:
    """Removes what an earlier process left: a socket, nothing else."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def request_id(given: str | None) -> str:
    """The caller's id if it is printable ASCII of a sane length, else "" (one is made)."""
    return given if given and len(given) <= REQUEST_ID_LENGTH and given.isascii() and given.isprintable() else ""


def trace_id(traceparent: str | None) -> str:
    """The trace id of a W3C ``traceparent``, or ""."""
    parts = (traceparent or "").split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""
