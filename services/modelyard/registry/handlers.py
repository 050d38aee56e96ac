"""What the registry does on events. Each repeats what the request did at once, for the case that it did not get there
(a crash between two commits), so each is safe to repeat and mostly finds nothing to do."""

from __future__ import annotations

from ..core.events import Envelope
from ..kernel.service import Context
from . import artifacts, holds
from .latest import settle, settled
from .model import exact


async def on_model_registered(ctx: Context, event: Envelope) -> None:
    """The highest version is the latest."""
    await settled(ctx, event.workspace, event.data["name"], event.data["version"])


async def on_model_deleted(ctx: Context, event: Envelope) -> None:
    """Another version may be the latest now, and the artifact may be needed by nobody."""
    await settle(ctx, event.workspace, event.data["name"])
    await artifacts.doom(ctx, event.workspace, event.data["artifact"])


async def on_model_aliased(ctx: Context, event: Envelope) -> None:
    """The holds of versions follow what the alias says now."""
    now, before = event.data["aliases"], event.data.get("previous", {}).get("aliases", {})
    for alias in now.keys() | before.keys():
        if now.get(alias) != before.get(alias):
            versions = {side[alias] for side in (now, before) if alias in side}
            await holds.follow(ctx, event.workspace, event.data["name"], alias, versions)


async def on_image_gone(ctx: Context, event: Envelope) -> None:
    """A failed or deleted image needs its models no longer (it says so itself as well; this is sooner)."""
    for ref in event.data.get("models", ()):
        await holds.release(ctx, event.workspace, exact(ref), "image", event.subject, cause=event.id)
