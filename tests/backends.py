"""The support matrix: which adapters there are of each port, and the URL that opens each of them in a test.

A backend that needs a server gives None when there is none here, and its tests are skipped by name; unless it is named
in ``MODELYARD_REQUIRE`` (comma-separated), for then its absence is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Backend:
    """``url(folder)`` is where a test's own, empty one lies; None: what it needs is not here."""

    name: str
    url: Callable[[Path], str | None]


MATRIX: dict[str, tuple[Backend, ...]] = {
    "store": (Backend("sqlite", lambda folder: f"sqlite://{folder}/yard.db"),),
    "bus": (Backend("sqlite", lambda folder: f"sqlite://{folder}/yard.db"),),
    "blobs": (Backend("file", lambda folder: f"file://{folder}/blobs"),),
    "grants": (Backend("file", lambda folder: f"file://{folder}/blobs"),),
    "images": (Backend("oci-layout", lambda folder: f"oci-layout://{folder}/images"),),
    "targets": (Backend("process", lambda folder: "process://"),),
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
    """What MODELYARD_REQUIRE names and nothing in the matrix is: it could never run, so it must not pass."""
    return required() - {backend.name for port in MATRIX.values() for backend in port}
