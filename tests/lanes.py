"""Which of many tests alike run in the fast lane: the others run in the slow one, as all did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: set[str], names: Iterable[str]) -> list[Any]:
    """``names`` as parameters, marked slow where they are not among ``quick``."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
