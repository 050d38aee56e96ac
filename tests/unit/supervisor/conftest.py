"""The supervisor is a program of its own: starting a child and adding a line to a log are what its loop is for."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def never_blocking() -> None:
    """The guard of the control plane's event loops does not apply here."""
