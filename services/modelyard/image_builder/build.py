"""The build loop: an image that is asked for is built, one that is deleted is taken apart."""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
import tempfile
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.errors import BuildFailed, Denied, Invalid, ModelyardError, NotFound, Unavailable
from ..core.layout import image_key, image_prefix
from ..kernel.service import Change, Context, Loop
from . import referrers, sources
from .assemble import Build, Result, Scratch
from .log import BuildLog, cleared, log_file
from .model import Image, building, built, failed, left_s, removed, waiting, waits_for

LOOK_S = 0.5
UNTAG_S = 5.0
FAULTS = 4
ABANDONED_S = 2 * 24 * 3600.0
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
log_fault = logging.getLogger(__name__)


async def step(ctx: Context, doc: Image) -> Change[Image]:
    """What to do about an image that is due."""
    if doc.deleting:
        await take_apart(ctx, doc)
        return lambda newest: removed(newest, ctx.now())
    if doc.phase == "ready":
        await attach(ctx, doc)
    if doc.phase not in ("queued", "building"):
        return lambda newest: None
    return await _unless_deleted(ctx, doc, build(ctx, doc))


async def build(ctx: Context, doc: Image) -> Change[Image]:
    """Builds; a failure of the owner's making is an outcome, any other is raised and tried again."""
    log, began = BuildLog(log_file(ctx, doc)), time.monotonic()
    if doc.phase == "building":  # whoever began it may have died
        await asyncio.to_thread(_swept, ctx, doc)
    async with log.shown(ctx, doc):
        outcome = await _outcome(ctx, doc, log)
    if isinstance(outcome, Result):
        log.note(f"built {outcome.digest}, {outcome.size / 1e6:.1f} MB, in {time.monotonic() - began:.2f} s")
    return await _over(ctx, doc, log, outcome)


async def _outcome(ctx: Context, doc: Image, log: BuildLog) -> Result | str:
    """What was built, or why it is not; raises what may go better another time."""
    scratch = Scratch(lambda: _folder(ctx, doc))
    try:
        await sources.hold_once(ctx, doc)
        doc = await ctx.change(Image, doc.id, lambda d: building(d, ctx.now()), workspace=doc.workspace)
        async with asyncio.timeout(left_s(doc, ctx.now())) as limit:
            return await Build(ctx, doc, log, scratch).run()
    except TimeoutError:
        if limit.expired():
            return _too_long(doc, waits_for(doc))
        raise
    except BuildFailed as exc:
        return exc.message
    except (Unavailable, Denied) as exc:  # Denied: of a store of ours, to which somebody will let us in
        if too_long := await _interrupted(ctx, doc, log, scratch, exc.message):
            return too_long
        raise
    except Exception as exc:  # a fault of ours: the loop logs and repeats it, but not for ever
        if isinstance(exc, OSError) and exc.errno in FULL:
            full = Unavailable(f"the disk of {ctx.data} is full; free some space")
            if too_long := await _interrupted(ctx, doc, log, scratch, full.message):
                return too_long
            raise full from exc
        if doc.attempts < FAULTS:
            raise
        log_fault.exception("image %s is given up after %d attempts", doc.id, doc.attempts + 1)
        told = f": {exc.message}" if isinstance(exc, ModelyardError) else f" ({type(exc).__name__})"
        return f"the builder failed {doc.attempts + 1} times{told}; the server's log says where"
    finally:
        await scratch.clear()


async def _interrupted(ctx: Context, doc: Image, log: BuildLog, scratch: Scratch, why: str) -> str:
    """Tells of a try that broke off; why there is no other, "" when there will be one."""
    await scratch.clear()  # the log may need its room
    if left_s(doc, ctx.now()) <= 0:
        return _too_long(doc, why)
    await log.line(f"interrupted: {why}; trying again soon")
    with suppress(ModelyardError):
        await log.show(ctx, doc)
        await ctx.change(Image, doc.id, lambda d: waiting(d, ctx.now(), why), workspace=doc.workspace)
    return ""


def _too_long(doc: Image, why: str) -> str:
    """Tries that broke off count as well: what never answers must not be waited for for ever."""
    return (f"the build took longer than {doc.timeout_s} s" + (f", and at last waited: {why}" if why else "")
            + "; the log says how far it came. Where it needs more, ask for the image with a higher timeout_s")


async def _over(ctx: Context, doc: Image, log: BuildLog, outcome: Result | str) -> Change[Image]:
    if isinstance(outcome, str):
        log.note(f"failed: {outcome}")
        await _untagged(ctx, doc)
    await log.keep(ctx, doc)
    now = ctx.now()
    if isinstance(outcome, str):
        return lambda newest: failed(newest, now, outcome)
    return lambda newest: built(newest, now, digest=outcome.digest, size=outcome.size,
                                lock_digest=outcome.lock_digest, python=outcome.python,
                                signatures=outcome.signatures, served_as=outcome.served_as)


async def _untagged(ctx: Context, doc: Image) -> None:
    """A build that fails may have put its tag before, or the one that died before it did: nobody finds an image there
    that we say is none. What is in the way is no reason to fail later: deleting the image takes the tag away too."""
    with suppress(ModelyardError, TimeoutError):
        async with asyncio.timeout(UNTAG_S):
            await ctx.images.remove(doc.repo, doc.tag)


async def _unless_deleted(ctx: Context, doc: Image, work: Coroutine[Any, Any, Change[Image]]) -> Change[Image]:
    """Runs a build, and stops it as soon as the image is deleted, by whichever process."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
            newest = await ctx.store.get(Image, doc.id, workspace=doc.workspace)
            if newest is None or newest.deleting:
                return lambda gone: None  # the deletion moved `due`: the loop comes again
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def attach(ctx: Context, doc: Image) -> None:
    """What is said of an image that has just become ready goes to its store as well. Nobody waits for it: our own API
    has it already. A store that takes no such thing is told of in the log, and the image is as good."""
    try:
        said = [b"".join([chunk async for chunk in ctx.blobs.get(image_key(doc.workspace, doc.id, name))])
                for name in referrers.NAMES]
        if found := await ctx.images.get_manifest(doc.repo, doc.tag):
            await referrers.attach(ctx.images, doc, found[0], referrers.documents(*said))
    except (Invalid, NotFound) as exc:
        log_fault.warning("bill of materials and provenance cannot be attached to image %s: %s", doc.id, exc)


async def take_apart(ctx: Context, doc: Image) -> None:
    """Lets go of the models, then removes what was built. Repeating is fine."""
    await sources.let_go(ctx, doc)
    await referrers.detach(ctx.images, doc)
    await ctx.images.remove(doc.repo, doc.tag)
    async for blob in ctx.blobs.list(image_prefix(doc.workspace, doc.id)):
        await ctx.blobs.delete(blob.key)
    await asyncio.to_thread(_forget, ctx, doc)


def _forget(ctx: Context, doc: Image) -> None:
    cleared(log_file(ctx, doc))
    _swept(ctx, doc)


def _folder(ctx: Context, doc: Image) -> Path:
    """A new folder for temporary files."""
    prefix = _swept(ctx, doc)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))


def _swept(ctx: Context, doc: Image) -> Path:
    """Where temporary folders of this image begin; those of builds that died are gone."""
    root, prefix = ctx.data / "image-builder" / "tmp", f"{doc.workspace}.{doc.name}.{doc.version}."
    for old in root.iterdir() if root.is_dir() else ():
        with suppress(FileNotFoundError):  # what another machine went on with is nobody's here
            if old.name.startswith(prefix) or time.time() - old.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(old, ignore_errors=True)
    return root / prefix


BUILD = Loop("build", Image, step, parallel=4, lease_s=15.0)
