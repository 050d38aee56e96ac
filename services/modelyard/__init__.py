"""Modelyard takes a trained model to where it is used and tells you how it does there.

``Client`` and ``AsyncClient`` are the SDK, with ``ScoringClient`` and ``AsyncScoringClient`` for calls to a deployment;
``model_path`` is for scoring files. Each is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.version import __version__

if TYPE_CHECKING:
    from .capture import model_path as model_path
    from .client import AsyncClient as AsyncClient
    from .client import AsyncScoringClient as AsyncScoringClient
    from .client import Client as Client
    from .client import ScoringClient as ScoringClient

__all__ = ["AsyncClient", "AsyncScoringClient", "Client", "ScoringClient", "__version__", "model_path"]


def __getattr__(name: str) -> Any:
    if name in ("Client", "AsyncClient", "ScoringClient", "AsyncScoringClient"):
        from . import client

        return getattr(client, name)
    if name == "model_path":
        from .capture import model_path

        return model_path
    raise AttributeError(f"module 'modelyard' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
