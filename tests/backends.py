"""The support matrix: which adapters there are of each port, and the URL that opens each of them in a test.

A backend that needs a server gives None when there is none here, and its tests are skipped by name; unless it is named
in ``MODELYARD_REQUIRE`` (comma-separated), for then its absence is a failure.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.stack import SERVERS, server_class
from tests import containers


@dataclass(frozen=True)
class Backend:
    """``url(folder)`` is where a test's own, empty one lies; None: what it needs is not here. ``clean(url)`` takes
    away what would burden a shared server."""

    name: str
    url: Callable[[Path], str | None]
    clean: Callable[[str], None] = lambda url: None


def server(name: str) -> str | None:
    """The URL of a real server: given in ``MODELYARD_TEST_<NAME>``, else of ``make stack``, else in a container that
    is started for it (tests/containers.py says when), else None."""
    if given := os.environ.get(f"MODELYARD_TEST_{name.upper()}"):
        return given
    for choice in (containers.url, _native) if containers.mode() == "1" else (_native, containers.url):
        if found := choice(name):
            return found
    return None


def _native(name: str) -> str | None:
    status = server_class(name)().status()
    return status.url if status.state == "running" else None


CORNERS: dict[str, set[str]] = {}
"""Server → the words of this session's corners in it, for who clears them away."""


def support() -> dict[str, str]:
    """Of each real server: whether it was given, is of ``make stack`` or in a container, could be had, or why not."""
    return {name: _support(name) for name in SERVERS}


def _support(name: str) -> str:
    if os.environ.get(f"MODELYARD_TEST_{name.upper()}"):
        return f"given in MODELYARD_TEST_{name.upper()}"
    class_, first = server_class(name), containers.mode() == "1"
    if _native(name) and not (first and containers.url(name)):
        return f"native, {class_.version}" + (f" ({containers.told(name)})" if first else "")
    return containers.told(name) or class_.missing() or "not started: make stack, or make test"


def _own(name: str, make: Callable[[str, str], str]) -> Callable[[Path], str | None]:
    """A test's own corner of a server: ``make(url, word)``, the word another for every test's folder."""

    def url(folder: Path) -> str | None:
        base, word = server(name), hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        if base:
            CORNERS.setdefault(name, set()).add(word)
        return base and make(base, word)

    return url


def _drop_database(url: str) -> None:
    """A hundred databases of a dozen indexes each are thousands of files in one server."""
    from pymongo import MongoClient

    with MongoClient[Any](url) as client:
        client.drop_database(client.get_default_database())


MATRIX: dict[str, tuple[Backend, ...]] = {
    "store": (Backend("sqlite", lambda folder: f"sqlite://{folder}/yard.db"),
              Backend("mongo", _own("mongo", lambda url, word: url.replace("?", f"test-{word}?", 1)), _drop_database)),
    "bus": (Backend("sqlite", lambda folder: f"sqlite://{folder}/yard.db"),
            Backend("kafka", _own("kafka", lambda url, word: f"{url}/t{word}?session_s=6&partitions=4"))),
    "blobs": (Backend("file", lambda folder: f"file://{folder}/blobs"),
              Backend("azure", _own("azure", lambda url, word: f"{url}/blobs-{word}"))),
    "grants": (Backend("file", lambda folder: f"file://{folder}/blobs"),
               Backend("azure", _own("azure", lambda url, word: f"{url}/grants-{word}"))),
    "images": (Backend("oci-layout", lambda folder: f"oci-layout://{folder}/images"),
               Backend("registry", _own("registry", lambda url, word: f"{url}/t{word}"))),
    "builders": (Backend("docker", _own("docker", lambda url, word: f"{url}?dockerfiles=none")),),
    "targets": (Backend("process", lambda folder: "process://"), Backend("docker", _own("docker", lambda url, _: url))),
}


def required() -> frozenset[str]:
    """The backends that must be here."""
    return frozenset(filter(None, (name.strip() for name in os.environ.get("MODELYARD_REQUIRE", "").split(","))))


def backends(port: str) -> list[object]:
    """For ``pytest.mark.parametrize``: every adapter of a port."""
    return [pytest.param(backend, id=backend.name) for backend in MATRIX[port]]


def url_of(backend: Backend, folder: Path) -> str:
    """The URL of a fresh one. Skips the test when it is not here, or fails it when it is required."""
    url = backend.url(folder)
    if url is None:
        (pytest.fail if backend.name in required() else pytest.skip)(f"{backend.name} is not available here")
    return url


def unknown() -> frozenset[str]:
    """What MODELYARD_REQUIRE names and is neither in the matrix, nor a server that tests start for themselves, nor the
    sandbox: it could never run, so it must not pass."""
    return required() - {backend.name for port in MATRIX.values() for backend in port} \
        - SERVERS.keys() - {"sandbox"}


def need(name: str) -> None:
    """For a test that starts its own server: skips when this machine cannot run one, or fails when it is required."""
    if reason := server_class(name).missing():
        (pytest.fail if name in required() else pytest.skip)(f"{name} is not available here: {reason}")
