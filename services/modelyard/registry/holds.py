"""Who needs a model: holds, aliases, and the deletion that they refuse. All decided on the model's own document."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ..core.errors import Conflict, InUse, Invalid, ModelyardError, NotFound
from ..core.events import Fact
from ..kernel.service import RETRIES, Context
from . import artifacts, model
from .latest import highest, settle
from .model import HOLD_KINDS, Model, ModelName
from .register import turn

OWNERS = {"image": ("image-builder", "/v1/images/"), "deployment": ("deployer", "/v1/deployments/")}
BLOCKS_NOTHING = ("failed", "cancelled")
ALIAS_ON_ITS_WAY = timedelta(seconds=60)


async def hold(ctx: Context, workspace: str, id: str, kind: str, holder: str) -> Model:
    """The model, held. Repeating is fine. NotFound when it is not there (any more): a deletion is one commit, and
    no hold comes behind it."""
    if kind not in HOLD_KINDS:
        raise Invalid(f"'{kind}' holds no models; {', '.join(HOLD_KINDS)} do", field="kind")

    def held(doc: Model) -> tuple[Model, tuple[Fact, ...]] | None:
        new = model.held(doc, kind, holder, ctx.now())
        return None if new is None else (new, ())

    return await ctx.change(Model, id, held, workspace=workspace)


async def release(ctx: Context, workspace: str, id: str, kind: str, holder: str,
                  cause: str | None = None) -> Model | None:
    """The model without the hold; None when there is no such model. Repeating is fine."""

    def released(doc: Model) -> tuple[Model, tuple[Fact, ...]] | None:
        new = model.released(doc, kind, holder)
        return None if new is None else (new, ())

    try:
        return await ctx.change(Model, id, released, workspace=workspace, cause=cause)
    except NotFound:
        return None


async def remove(ctx: Context, workspace: str, id: str, check: Callable[[Model], None]) -> Model | None:
    """Deletes a version; None when it is not there. InUse names what blocks it. A hold that arrives meanwhile makes
    the commit a Conflict, and everything is looked at again."""
    for _ in range(RETRIES):
        doc = await ctx.store.get(Model, id, workspace=workspace)
        if doc is None:
            return None
        check(doc)
        if blockers := await blocking(ctx, doc):
            told = ", ".join(f"{b['kind']} '{b['id']}'" + (f" ({b['phase']})" if b["phase"] else "") for b in blockers)
            raise InUse(f"{id} is in use by {told}", blockers=blockers)
        gone = doc.evolve(deleted=True, holds={}, marks=(), updated=ctx.now())
        try:
            gone = await ctx.commit(gone, Fact("model.deleted"))
        except Conflict:
            continue
        await settle(ctx, workspace, doc.name)
        await artifacts.doom(ctx, workspace, doc.artifact)
        return gone
    raise Conflict(f"{id} changes too often; try again")


async def blocking(ctx: Context, doc: Model) -> list[dict[str, Any]]:
    """``[{"kind", "id", "phase"}]`` of the holds that count, by asking those who hold."""
    found = await asyncio.gather(*(_blocker(ctx, doc, *model.split_hold(hold)) for hold in sorted(doc.holds)))
    return [blocker for blocker in found if blocker is not None]


async def _blocker(ctx: Context, doc: Model, kind: str, holder: str) -> dict[str, Any] | None:
    if kind == "alias":
        return await _alias_blocker(ctx, doc, holder)
    service, prefix = OWNERS[kind]
    try:
        answer = await ctx.peers.call(service, "GET", prefix + holder, workspace=doc.workspace)
    except ModelyardError:   # who cannot be asked counts: better a refusal than a hole
        return {"kind": kind, "id": holder, "phase": "unknown"}
    if answer is None or answer.get("phase") in BLOCKS_NOTHING:
        return None
    return {"kind": kind, "id": holder, "phase": answer.get("phase")}


async def _alias_blocker(ctx: Context, doc: Model, alias: str) -> dict[str, Any] | None:
    """The hold comes before the alias: one without the other is an alias on its way, or a leftover of a crash."""
    names = await ctx.store.get(ModelName, doc.name, workspace=doc.workspace)
    points_here = names is not None and names.aliases.get(alias) == doc.version
    if points_here or doc.holds[f"alias/{alias}"] > ctx.now() - ALIAS_ON_ITS_WAY:
        return {"kind": "alias", "id": f"{doc.name}@{alias}", "phase": None}
    return None


# -- aliases --------------------------------------------------------------------------------------------------------


async def point(ctx: Context, workspace: str, name: str, alias: str, version: int | None,
                check: Callable[[ModelName], None]) -> ModelName | None:
    """Points the alias at a version, or at nothing; None when it pointed at nothing and shall.

    Raises NotFound for a name without models, Invalid for a version that is not there.
    """
    async with turn(ctx, workspace, f"{name}@"):
        touched: set[int] = set()
        if version is not None:
            await _hold_for(ctx, workspace, name, alias, version)
            touched.add(version)
        try:
            doc = await _repoint(ctx, workspace, name, alias, version, check, touched)
        finally:
            await follow(ctx, workspace, name, alias, touched)
        return doc


async def _hold_for(ctx: Context, workspace: str, name: str, alias: str, version: int) -> None:
    try:
        await hold(ctx, workspace, f"{name}:{version}", "alias", alias)
    except NotFound as exc:
        if await highest(ctx, workspace, name) is None:
            raise NotFound(f"there is no model '{name}'", kind="model", id=name) from exc
        raise Invalid(f"there is no version {version} of '{name}'", field="version") from exc


async def _repoint(ctx: Context, workspace: str, name: str, alias: str, version: int | None,
                   check: Callable[[ModelName], None], touched: set[int]) -> ModelName | None:
    """Commits the alias; adds the version that it pointed at before to ``touched``."""
    for _ in range(RETRIES):
        doc = await ctx.store.get(ModelName, name, workspace=workspace)
        if doc is None:
            if version is None:
                return None
            doc = ModelName(id=name, workspace=workspace, name=name, created=ctx.now())
        check(doc)
        touched |= {doc.aliases[alias]} if alias in doc.aliases else set()
        wanted = {k: v for k, v in doc.aliases.items() if k != alias} | ({} if version is None else {alias: version})
        if (step := model.aliased(doc, dict(sorted(wanted.items())), ctx.now())) is None:
            return doc if version is not None else None
        try:
            return await ctx.commit(step[0], Fact("model.aliased", {"previous": step[1]}))
        except Conflict:
            continue
    raise Conflict(f"the aliases of '{name}' change too often; try again")


async def follow(ctx: Context, workspace: str, name: str, alias: str, versions: set[int]) -> None:
    """Makes the holds of these versions say what the alias says; looks again until there is nothing to do."""
    for _ in range(RETRIES):
        names = await ctx.store.get(ModelName, name, workspace=workspace)
        target = names.aliases.get(alias) if names is not None else None
        changed = False
        for version in versions | ({target} if target is not None else set()):
            doc = await ctx.store.get(Model, f"{name}:{version}", workspace=workspace)
            if doc is None or (f"alias/{alias}" in doc.holds) == (version == target):
                continue
            changed = True
            if version == target:
                await hold(ctx, workspace, doc.id, "alias", alias)
            else:
                await release(ctx, workspace, doc.id, "alias", alias)
        if not changed:
            return
