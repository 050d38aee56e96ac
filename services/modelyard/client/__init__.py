"""The SDK: ``Client`` (blocking) and ``AsyncClient`` with the same methods, over the HTTP API of any yard."""

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
    from .events import Event as Event

__all__ = [
    "AsyncClient", "AsyncDeployment", "AsyncImage", "AsyncModel", "Capture", "Change", "Client", "Deployment", "Event",
    "Image", "Model", "Progress", "Verification",
]


def __getattr__(name: str) -> Any:
    """``Change`` and ``Event`` are documents with rules: imported when they are asked for."""
    if name == "Change":
        from .apply import Change

        return Change
    if name == "Event":
        from .events import Event

        return Event
    raise AttributeError(f"module 'modelyard.client' has no attribute '{name}'")
