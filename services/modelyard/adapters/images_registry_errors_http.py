"""What goes wrong between us and a registry, as errors of ours; and how long to wait before the next try."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from ..core.errors import Denied, Invalid, ModelyardError, NotFound, Unavailable
from ..kernel.proxies import NAMED
from .images_registry_login import config_file

FIRST_S, LONGEST_S = 0.2, 5.0
PATIENCE_S = 60.0
"""A registry that wants us to stay away for longer is an error at once: the caller comes back by itself."""
SAID = 4096
BROKEN = (aiohttp.ClientError, TimeoutError, ConnectionError, OSError, ssl.SSLError)
"""What a cut or silent connection raises here."""


def broken(host: str, about: str, exc: BaseException, timeout_s: float) -> ModelyardError:
    """The error of a connection that failed."""
    if isinstance(exc, aiohttp.ClientProxyConnectionError):
        return Unavailable(f"{about}: the proxy on the way to {host} does not answer ({exc.os_error.strerror or exc}); "
                           f"{NAMED} say which one")
    if isinstance(exc, aiohttp.ClientHttpProxyError):
        return proxied(host, about, exc.status)
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return Unavailable(f"{about}: the certificate of {host} is not trusted here; add its authority by "
                           "SSL_CERT_FILE")
    if isinstance(exc, aiohttp.ClientSSLError | ssl.SSLError):
        return Unavailable(f"{about}: {host} does not speak TLS as we do; if it speaks none, add ?tls=off to its URL")
    if isinstance(exc, TimeoutError):
        return Unavailable(f"{about}: the registry {host} does not answer within {timeout_s:g} s")
    if isinstance(exc, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return Unavailable(f"{about}: the registry {host} breaks off in the middle of its answer; look at what lies "
                           "between")
    told = type(exc).__name__ if isinstance(exc, aiohttp.ClientResponseError) else exc or type(exc).__name__
    return Unavailable(f"{about}: the registry {host} does not answer ({told}); check the address and that it runs")


def proxied(host: str, about: str, status: int) -> ModelyardError:
    """The error of a proxy that lets nobody through."""
    if status == 407:
        return Denied(f"{about}: the proxy on the way to {host} wants credentials, or others; "
                      f"http://USER:PASSWORD@HOST:PORT says them in {NAMED.partition(' and ')[0]}")
    told = f"{about}: the proxy on the way to {host} does not let us through ({status}); {NAMED} say which one"
    return Denied(told) if status in (401, 403) else Unavailable(told)


def refused(host: str, about: str, status: int, headers: Mapping[str, str], said: str) -> ModelyardError:
    """The error of an answer that nobody wanted. ``said`` is the registry's own word, in brackets."""
    if status == 407:
        return proxied(host, about, status)
    if status == 401:
        return Denied(f"{about}: the registry {host} wants other credentials; run docker login {host} as the user that "
                      f"Modelyard runs as (they are read from {config_file()})")
    if status == 403:
        return Denied(f"{about}: the registry {host} forbids it{said}; ask its owner for the right, or log in as "
                      f"somebody who has it: docker login {host}")
    if status == 404:
        return NotFound(f"{about}: the registry {host} does not know it{said}")
    wait = retry_after(headers)
    later: dict[str, Any] = {} if wait is None else {"retry_after": wait}
    if status == 429:
        until = f"; it wants to be left alone for {wait:.0f} s" if wait is not None and wait > PATIENCE_S else ""
        return Unavailable(f"{about}: the registry {host} takes no more calls for now{said}{until}",
                           **{"retry_after": 1, **later})
    if status >= 500:
        return Unavailable(f"{about}: the registry {host} failed with {status}{said}; its log says why", **later)
    return Invalid(f"{about}: the registry {host} refused it with {status}{said}")


def said(body: bytes) -> str:
    """What a registry's error says, in brackets."""
    try:
        first: Any = json.loads(body[:SAID])["errors"][0]
        text = f"{first.get('code', '')}: {first.get('message', '')}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    return f" ({' '.join(text.split())[:200]})"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from a number or a date; None where it is not told."""
    told = headers.get("Retry-After", "").strip()
    if told.isascii() and told.isdigit():
        return float(told[:9])
    try:
        return max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


async def pause(attempt: int, error: BaseException | None = None) -> None:
    """Before the next try: longer each time, never in step with others, and as long as the registry wants. Raises
    ``error`` where that is too long."""
    wanted = float(error.detail.get("retry_after", 0)) if isinstance(error, ModelyardError) else 0.0
    if error is not None and wanted > PATIENCE_S:
        raise error
    wait = min(FIRST_S * 2 ** (attempt - 1), LONGEST_S) * random.uniform(0.7, 1.3)
    await asyncio.sleep(max(wait, wanted))
