"""The loop: looks at what runs, brings it to what is wanted, writes down what it saw, and comes back for ever."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from ..core.documents import plain
from ..core.errors import Denied, Invalid, ModelyardError, Unavailable
from ..core.events import Fact
from ..kernel.observe import Once
from ..kernel.service import Change, Context, Loop
from ..ports.targets import DeploymentTarget, Observed, Workload
from .images import keep_holds, let_go, look_up, trusted
from .model import Deployment, Found, Step, Sweep, waiting_for
from .outcome import TROUBLE_S, Seen, settled

log = logging.getLogger(__name__)
GRANT_S = 3600
AGAIN_S = 30
SWEEP_S, LEFT_S = 30.0, 30.0
SAID = Once()


async def step(ctx: Context, doc: Deployment) -> Change[Deployment]:
    """One look at one deployment."""
    target = ctx.targets.get(doc.target)
    if target is None:
        why = f"no deployer that runs has the target '{doc.target}' in its settings"
        return lambda newest: waiting_for(newest, ctx.now(), why, TROUBLE_S)
    if doc.phase == "deleting":
        return await leave(ctx, doc, target)
    holds, trouble = await keep_holds(ctx, doc)
    image = None if doc.image_digest else await _image(ctx, doc)
    observed = await target.observe(doc.workspace, doc.id)
    until, why = None, "Refused"
    digest = doc.image_digest or (image.digest if image else None)
    if digest and not trouble and needs_apply(doc, observed, ctx.now()):
        try:
            if observed.state == "absent" or observed.generation != doc.generation:  # not a new grant for what runs
                await trusted(ctx, target, doc.image, digest, doc.workspace)
            observed, until = await _apply(ctx, doc, digest, target)
        except Invalid as exc:
            trouble, why = exc.message, "Unsigned" if exc.code == "unsigned" else why
        except Unavailable as exc:
            return _awaited(ctx, doc, exc.message)
    seen = Seen(doc.generation, observed, image, trouble, holds, until, why)
    return lambda newest: settled(newest, seen, ctx.now())


def ours(ctx: Context, doc: Deployment) -> bool:
    """Whether its target is one of ours; or nobody came to look for so long that somebody must say so."""
    return doc.target in ctx.targets or (doc.due is not None and ctx.now() - doc.due > timedelta(seconds=LEFT_S))


def needs_apply(doc: Deployment, observed: Observed, now: datetime) -> bool:
    """Whether the target must be told: it runs nothing or another generation, or the capture grant grows old."""
    if observed.state == "absent" or observed.generation != doc.generation:
        return True
    return doc.grant_until is None or doc.grant_until - now < timedelta(seconds=GRANT_S / 2)


def _awaited(ctx: Context, doc: Deployment, why: str) -> Change[Deployment]:
    """The target does not answer: said in the document, and once in the log, until it does."""
    if why not in {condition.message for condition in doc.conditions}:
        log.warning("'%s' waits for its target '%s': %s", doc.id, doc.target, why)
    return lambda newest: waiting_for(newest, ctx.now(), why, TROUBLE_S)


async def _image(ctx: Context, doc: Deployment) -> Found | None:
    """The wanted image as it is now; one that is gone reads as failed. None when the builder does not answer."""
    try:
        found = await look_up(ctx, doc.image, doc.workspace)
    except Unavailable:
        return None
    if found is None:
        return Found(id=doc.image, name=doc.image_name, phase="failed", reason="it was deleted")
    return found if found.phase == "ready" else found.model_copy(update={"digest": None})


async def _apply(ctx: Context, doc: Deployment, digest: str, target: DeploymentTarget) -> tuple[Observed, datetime]:
    """Tells the target what to run, with a fresh grant. Scoring never waits for the blob store: without a grant
    captured calls stay in the spool, and the next look but a few tries again."""
    now = ctx.now()
    try:
        grant = await ctx.grants.lend(doc.workspace, doc.id, GRANT_S)
        until = now + timedelta(seconds=GRANT_S)
        SAID.clear((doc.workspace, doc.id))
    except (Unavailable, Denied) as exc:
        if SAID.new((doc.workspace, doc.id), exc):
            log.warning("no capture grant for '%s': %s", doc.id, exc)
        grant, until = "", now + timedelta(seconds=GRANT_S / 2 + AGAIN_S)
    return await target.apply(workload(doc, digest, grant)), until


def workload(doc: Deployment, digest: str, grant: str) -> Workload:
    """What the target is told."""
    repo = doc.image_name if doc.workspace == "default" else f"{doc.workspace}/{doc.image_name}"
    return Workload(
        workspace=doc.workspace, name=doc.id, generation=doc.generation, image=doc.image, repo=repo, digest=digest,
        replicas=doc.replicas, models=tuple(doc.models), ports=doc.ports, capture=plain(doc.capture),
        limits=plain(doc.limits), resources=plain(doc.resources), env=doc.env,
        secrets={name: {k: v for k, v in plain(secret).items() if v is not None}
                 for name, secret in doc.secrets.items()}, grant=grant,
        progress_deadline_s=doc.progress_deadline_s)


async def leave(ctx: Context, doc: Deployment, target: DeploymentTarget) -> Change[Deployment]:
    """Everything of it goes, captured calls to the blob store first; only then it is a tombstone."""
    try:
        await _last_grant(ctx, doc, target)
        await target.remove(doc.workspace, doc.id)
        await ctx.grants.revoke(doc.workspace, doc.id)
        for image in doc.holds:
            await let_go(ctx, doc, image)
    except Unavailable as exc:
        why = exc.message
        return lambda newest: waiting_for(newest, ctx.now(), why, TROUBLE_S)
    return lambda newest: _gone(newest, ctx.now())


def _gone(doc: Deployment, now: datetime) -> Step:
    facts: Sequence[Fact] = (Fact("deployment.deleted"),)
    return doc.evolve(deleted=True, due=None, updated=now, holds={}, replicas_ready=0, serving=0), facts


async def _last_grant(ctx: Context, doc: Deployment, target: DeploymentTarget) -> None:
    """What is still in the spool needs a grant that holds."""
    if doc.grant_until is None or not doc.image_digest or doc.grant_until - ctx.now() > timedelta(seconds=GRANT_S / 4):
        return
    observed = await target.observe(doc.workspace, doc.id)
    if observed.state == "present":
        await _apply(ctx, doc, doc.image_digest, target)


async def sweep(ctx: Context, doc: Sweep) -> Change[Sweep]:
    """Ends what runs on our targets and belongs to no deployment. Documents are written before anything is started,
    so whatever has none is left over from a crash."""
    for name, target in ctx.targets.items():
        try:
            for workspace, id_ in await target.list():
                known = await ctx.store.get(Deployment, id_, workspace=workspace)
                if known is None or known.target != name:
                    log.warning("'%s' runs on %s and belongs to no deployment: it is removed", id_, name)
                    await target.remove(workspace, id_)
        except ModelyardError as exc:
            log.warning("left-over deployments on %s cannot be removed: %s", name, exc)
    return lambda newest: (newest.evolve(due=ctx.now() + timedelta(seconds=SWEEP_S)), ())


CONVERGE = Loop("converge", of=Deployment, step=step, mine=ours, parallel=16, max_backoff_s=10.0)
SWEEP = Loop("sweep", of=Sweep, step=sweep, parallel=1, every_s=5.0)
