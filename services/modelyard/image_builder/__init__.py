"""IMAGE BUILDER: models, scoring file and dependencies become an OCI image, without a daemon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..kernel.service import Context, Service
from .build import BUILD
from .model import Image

if TYPE_CHECKING:
    from ..kernel.web import Route


def _routes(ctx: Context) -> Sequence[Route]:
    from .api import ROUTES  # aiohttp comes with it: only a process that serves needs it

    return ROUTES


SERVICE = Service(name="image-builder", documents=(Image,), owns=("/v1/images", "/v1/signing-key"), routes=_routes,
                  loops=(BUILD,))
