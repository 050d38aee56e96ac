"""gRPC channels to a deployment: TLS, the standard retries, and connections that are not shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ..core.errors import Invalid
from .oip import OPTIONS

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Tls:
    """PEM files. ``ca``: who may sign the server's certificate (absent: the authorities that gRPC trusts). ``cert``
    and ``key``, together, are shown to a server that asks for them. ``server_name``: the name in the certificate,
    where it is not the address's own."""

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises Invalid when a file cannot be read."""
        if (self.cert is None) != (self.key is None):
            raise Invalid("TLS needs cert and key together", field="tls")
        try:
            ca, key, cert = (None if file is None else Path(file).read_bytes()
                             for file in (self.ca, self.key, self.cert))
        except OSError as exc:
            raise Invalid(f"a TLS file cannot be read: {exc}", field="tls") from exc
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True)
class Route:
    """How to reach a deployment: ``channel(n)`` is its n-th connection, each a TCP connection of its own, to the
    addresses in turn."""

    addresses: Sequence[str]
    credentials: grpc.ChannelCredentials | None
    server_name: str = ""

    def address(self, number: int) -> str:
        """Where connection ``number`` goes."""
        return self.addresses[number % len(self.addresses)]

    def open(self, number: int) -> grpc.aio.Channel:
        """For the running event loop."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address(number), options=self._options())
        return grpc.aio.secure_channel(self.address(number), self.credentials, options=self._options())

    def open_blocking(self, number: int) -> grpc.Channel:
        """For threads that wait."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address(number), options=self._options())
        return grpc.secure_channel(self.address(number), self.credentials, options=self._options())

    def _options(self) -> list[tuple[str, Any]]:
        options: list[tuple[str, Any]] = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        return options


def route(address: str | Sequence[str], tls: Tls | bool | None) -> Route:
    """Reads the TLS files. Raises Invalid for no address, or one with a scheme (``http://…``), and for the files."""
    addresses = (address,) if isinstance(address, str) else tuple(address)
    for given in addresses or ("",):
        if not given or "://" in given:
            raise Invalid(f"'{given}' is not a gRPC address; write host:port or unix:PATH", field="address")
    if not tls:
        return Route(addresses, None)
    files = Tls() if tls is True else tls
    return Route(addresses, files.credentials(), files.server_name)


def metadata(*given: Mapping[str, str] | None, request_id: str = "") -> Metadata:
    """The later one wins; keys in lower case, as HTTP/2 has them. Raises Invalid for what no header can hold."""
    found = {str(key).lower(): value for one in given if one for key, value in one.items()}
    if request_id:
        found["x-request-id"] = request_id
    for key, value in found.items():
        if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not key.isascii():
            raise Invalid(f"metadata '{key}' must be printable ASCII text", field="metadata")
    return tuple(found.items())
