"""The SDK: ``Client`` (blocking) and ``AsyncClient`` with the same methods, over the HTTP API of any yard;
``ScoringClient`` and ``AsyncScoringClient`` for calls to a deployment, by its gRPC address alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .client import AsyncClient
from .deployments import AsyncDeployment
from .images import AsyncImage
from .models import AsyncModel
from .sync import Capture, Client, Deployment, Image, Model
from .uploads import Progress
from .verify import Verification

if TYPE_CHECKING:
    from .apply import Change as Change
    from .channels import Tls as Tls
    from .events import Event as Event
    from .inference import AsyncScoringClient as AsyncScoringClient
    from .inference_sync import ScoringClient as ScoringClient

__all__ = [
    "AsyncClient", "AsyncDeployment", "AsyncImage", "AsyncModel", "AsyncScoringClient", "Capture", "Change", "Client",
    "Deployment", "Event", "Image", "Model", "Progress", "ScoringClient", "Tls", "Verification",
]
LATE = {"Change": "apply", "Event": "events", "ScoringClient": "inference_sync", "AsyncScoringClient": "inference",
        "Tls": "channels"}
"""Documents with rules, and what needs gRPC and numpy: imported when they are asked for."""


def __getattr__(name: str) -> Any:
    if name in LATE:
        from importlib import import_module

        return getattr(import_module(f".{LATE[name]}", __name__), name)
    raise AttributeError(f"module 'modelyard.client' has no attribute '{name}'")
