"""Fetches one file of a package index, or of a folder that stands in for one: bounded, and checked by its sha256.

uv finds the file; it has no command that only fetches one. Credentials are those that uv would use: of the index's URL,
of ``UV_INDEX_<NAME>_USERNAME`` and ``…_PASSWORD``, or of the netrc file, for the index's own host and nobody else.
"""

from __future__ import annotations

import base64
import hashlib
import netrc
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from yarl import URL

from ..core.errors import BuildFailed, Invalid
from ..kernel.proxies import through

LARGEST = 512 << 20
SILENT_S, WHOLE_S = 60.0, 600.0
CHUNK = 1 << 20
INDEXES = re.compile(r"^UV_((DEFAULT_|EXTRA_)?INDEX(_URL)?|FIND_LINKS)$")


def fetch(url: str, path: Path, sha256: str, environment: Mapping[str, str]) -> str:
    """Writes it to ``path`` and gives its sha256. BuildFailed when it is not what the index says it is, is too large or
    takes too long, and when the index does not answer. ``environment``: what uv sees. Blocking."""
    parts = urlsplit(url)
    pieces = _local(parts, environment) if parts.scheme == "file" else _remote(url, parts, environment)
    seen, size, name, until = hashlib.sha256(), 0, unquote(parts.path.rpartition("/")[2]), time.monotonic() + WHOLE_S
    with path.open("xb") as out:
        for chunk in pieces:
            size += len(chunk)
            if size > LARGEST:
                raise BuildFailed(f"{name} has more than {LARGEST >> 20} MiB, which are fetched at most")
            if time.monotonic() > until:
                raise BuildFailed(f"{name} was not here after {WHOLE_S:g} s; is the package index that slow?")
            seen.update(chunk)
            out.write(chunk)
    if sha256 and seen.hexdigest() != sha256:
        raise BuildFailed(f"{name} is not what the index says it is: its sha256 is {seen.hexdigest()}, not {sha256}")
    return seen.hexdigest()


def _local(parts: SplitResult, environment: Mapping[str, str]) -> Iterator[bytes]:
    """Only below a folder that the builder's owner named."""
    path = Path(unquote(parts.path)).resolve()
    if not any(path.is_relative_to(folder) for folder in _folders(environment)):
        raise BuildFailed(f"{path} is of no folder that UV_FIND_LINKS or an index names")
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _places(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Name and URL of each index or folder: ``corp=https://…`` has a name."""
    for key, value in environment.items():
        for place in re.split(r"[\s,]+", value) if INDEXES.match(key) else ():
            name, equals, url = place.partition("=")
            named = equals and "://" in url and not re.search(r"[/:]", name)
            yield (name, url) if named else ("", place)


def _folders(environment: Mapping[str, str]) -> Iterator[Path]:
    for _, place in _places(environment):
        parts = urlsplit(place)
        if place and parts.scheme in ("", "file"):
            yield Path(unquote(parts.path)).resolve()


def _remote(url: str, parts: SplitResult, environment: Mapping[str, str]) -> Iterator[bytes]:
    if parts.scheme not in ("http", "https"):
        raise BuildFailed(f"a package index offers a file at {parts.scheme}://, which is not fetched")
    host = parts.netloc.rpartition("@")[2]
    asked = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"accept-encoding": "identity"})
    if found := _credentials(parts, environment):  # not for where a redirect leads
        asked.add_unredirected_header("authorization", "Basic " + base64.b64encode(":".join(found).encode()).decode())
    opener = urllib.request.build_opener(
        _Proxied(), urllib.request.HTTPSHandler(context=ssl.create_default_context()))
    try:
        with opener.open(asked, timeout=SILENT_S) as answer:
            while chunk := answer.read(CHUNK):
                yield chunk
    except urllib.error.HTTPError as exc:
        raise BuildFailed(f"the package index answers {exc.code} to {parts.path}: {exc.reason}") from exc
    except Invalid as exc:  # what is named as a proxy is none
        raise BuildFailed(exc.message) from exc
    except OSError as exc:
        raise BuildFailed(f"the package index does not answer: {exc}") from exc


class _Proxied(urllib.request.ProxyHandler):
    """Through the proxy that uv goes through, and past it where uv goes past it; a redirect is looked at anew."""

    def __init__(self) -> None:
        super().__init__({})

    def http_open(self, asked: urllib.request.Request) -> Any:
        """None: not through one."""
        proxy = through(URL(asked.full_url))
        return None if proxy is None else self.proxy_open(asked, str(proxy), asked.type)

    https_open = http_open


def _credentials(parts: SplitResult, environment: Mapping[str, str]) -> tuple[str, str] | None:
    if parts.username:
        return unquote(parts.username), unquote(parts.password or "")
    for name, place in _places(environment):
        own = urlsplit(place)
        if (own.scheme, own.hostname, own.port) != (parts.scheme, parts.hostname, parts.port):
            continue
        if own.username:
            return unquote(own.username), unquote(own.password or "")
        key = "UV_INDEX_" + re.sub(r"[^A-Z0-9]", "_", name.upper())
        if name and (user := environment.get(f"{key}_USERNAME")):
            return user, environment.get(f"{key}_PASSWORD", "")
    with suppress(OSError, netrc.NetrcParseError):
        if found := netrc.netrc(environment.get("NETRC")).authenticators(parts.hostname or ""):
            return found[0], found[2] or ""
    return None
