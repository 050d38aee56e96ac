"""Events that make a deployment go on sooner. Without them its loop finds out by itself."""

from __future__ import annotations

from ..core.events import Envelope
from ..kernel.service import Context
from .model import Deployment, look_again

PAGE = 100


async def on_image_done(ctx: Context, event: Envelope) -> None:
    """An image was built, or failed: those who wait for it look now."""
    after: tuple[str, str] | None = None
    while True:
        found = await ctx.store.find(Deployment, {"image": event.subject}, workspace=event.workspace, after=after,
                                     limit=PAGE)
        for doc in found:
            if doc.phase == "pending":
                await ctx.change(Deployment, doc.id, lambda newest: look_again(newest, ctx.now()),
                                 workspace=event.workspace, cause=event.id)
        if len(found) < PAGE:
            break
        after = (found[-1].id, found[-1].id)
    ctx.wake("converge")


HANDLERS = {"image.built": on_image_done, "image.failed": on_image_done}
