"""The SDK: ``Client`` (blocking) and ``AsyncClient`` with the same methods, over the HTTP API of any yard."""

from .apply import Change
from .client import AsyncClient
from .deployments import AsyncDeployment
from .events import Event
from .images import AsyncImage
from .models import AsyncModel
from .sync import Capture, Client, Deployment, Image, Model
from .uploads import Progress

__all__ = [
    "AsyncClient", "AsyncDeployment", "AsyncImage", "AsyncModel", "Capture", "Change", "Client", "Deployment", "Event",
    "Image", "Model", "Progress",
]
