"""REGISTRY: artifacts by digest, and models by name and version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..kernel.service import Context, Loop, Service
from . import artifacts, handlers
from .model import Artifact, Model, ModelName

if TYPE_CHECKING:
    from ..kernel.web import Route


def _routes(ctx: Context) -> Sequence[Route]:
    from .api import ROUTES  # aiohttp comes with it: only a process that serves needs it

    return ROUTES


SERVICE = Service(
    name="registry",
    documents=(Artifact, Model, ModelName),
    owns=("/v1/models", "/v1/artifacts"),
    routes=_routes,
    handlers={
        "model.registered": handlers.on_model_registered,
        "model.deleted": handlers.on_model_deleted,
        "model.aliased": handlers.on_model_aliased,
        "image.failed": handlers.on_image_gone,
        "image.deleted": handlers.on_image_gone,
    },
    loops=(Loop(name="purge", of=Artifact, step=artifacts.purge, every_s=5.0),),
)
