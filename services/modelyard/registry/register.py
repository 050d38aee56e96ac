"""Registration: check everything, take the next version, be the latest."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from weakref import WeakValueDictionary

from ..core.documents import Ref
from ..core.errors import Conflict, Invalid, NotFound
from ..core.events import Fact
from ..core.layout import artifact_key
from ..core.specs import ModelSpec
from ..kernel.service import Context
from . import artifacts
from .blob_file import inspect
from .claims import Seen, examine, wrong
from .latest import highest, next_number, settle, took
from .model import Artifact, Model, ModelName, made

_TURNS: WeakValueDictionary[tuple[int, str, str], asyncio.Lock] = WeakValueDictionary()
TRIES = 1000


def turn(ctx: Context, workspace: str, name: str) -> asyncio.Lock:
    """One lock per name of this process. It only saves tries: what is right is decided by the commit."""
    return _TURNS.setdefault((id(ctx.store), workspace, name), asyncio.Lock())


async def resolve(ctx: Context, workspace: str, text: str) -> Model:
    """The model that ``name:version``, ``name`` (the highest version) or ``name@alias`` means now. NotFound."""
    ref = Ref.parse(text)
    version = ref.version
    if ref.alias is not None:
        names = await ctx.store.get(ModelName, ref.name, workspace=workspace)
        version = names.aliases.get(ref.alias) if names is not None else None
        if version is None:
            raise NotFound(f"the model '{ref.name}' has no alias '{ref.alias}'", kind="model", id=text)
    if version is None:
        doc = await highest(ctx, workspace, ref.name)
    else:
        doc = await ctx.store.get(Model, f"{ref.name}:{version}", workspace=workspace)
    if doc is None:
        raise NotFound(f"there is no model '{text}'", kind="model", id=text)
    return doc


async def register(ctx: Context, workspace: str, spec: ModelSpec, key: str | None) -> Model:
    """The new version, committed with ``model.registered``. ``key`` seen before: the version made by it, as it is now,
    also when it was deleted since.

    Raises Invalid naming every problem, Conflict when the artifact is being removed at this very moment.
    """
    before = await _made_before(ctx, workspace, key)
    if before is not None and before.deleted:
        return before
    if before is None:
        record, seen, parent = await _checked(ctx, workspace, spec)
        doc = await _numbered(ctx, workspace, spec, record, seen, parent, key)
    else:
        doc = before  # of a first try that died the rest may be undone
    await settle(ctx, workspace, spec.name, doc if before is None else None)
    await _still_there(ctx, doc)
    return doc


async def _made_before(ctx: Context, workspace: str, key: str | None) -> Model | None:
    """What an earlier try of the same request made."""
    if key is None:
        return None
    done = await ctx.store.find(Model, {"made_by": key}, workspace=workspace, limit=1, tombstones=True)
    return done[0] if done else None


async def _checked(ctx: Context, workspace: str, spec: ModelSpec) -> tuple[Artifact, Seen, str | None]:
    """What the request needs from elsewhere; all that is wrong with it is said at once."""
    errors: list[dict[str, str]] = []
    code: str | None = None
    seen, parent = Seen("custom"), None
    if spec.parent is not None:
        try:
            parent = (await resolve(ctx, workspace, spec.parent)).id
        except NotFound as exc:
            errors.append({"field": "parent", "message": exc.message})
    record = await artifacts.kept(ctx, workspace, spec.artifact)
    try:
        if record is None:
            raise wrong(f"{spec.artifact} is not here; upload it first: PUT /v1/artifacts/{spec.artifact}")
        seen = await look(ctx, record, spec)
    except Invalid as exc:
        code = exc.code
        errors += exc.detail["errors"]
    if errors or record is None:
        raise Invalid("; ".join(e["message"] for e in errors), code=code, errors=errors)
    return record, seen, parent


async def look(ctx: Context, record: Artifact, spec: ModelSpec) -> Seen:
    """Examines the artifact's bytes where they lie."""
    key = artifact_key(record.workspace, record.id)
    return await inspect(ctx.blobs, key, record.size, lambda file: examine(file, record.size, spec))


async def _numbered(ctx: Context, workspace: str, spec: ModelSpec, record: Artifact, seen: Seen,
                    parent: str | None, key: str | None) -> Model:
    async with turn(ctx, workspace, spec.name):
        for attempt in range(TRIES):
            number = await next_number(ctx, workspace, spec.name, look=attempt > 0)
            doc = made(spec, number, workspace=workspace, size=record.size, seen=seen, parent=parent, made_by=key,
                       now=ctx.now())
            try:
                doc = await ctx.commit(doc, Fact("model.registered"))
            except Conflict:   # another process took this version
                continue
            took(ctx, doc)
            return doc
    raise Conflict(f"too many registrations of '{spec.name}' at once; try again")


async def _still_there(ctx: Context, doc: Model) -> None:
    """The artifact may have been on its way out since it was checked: then this version never was."""
    with suppress(Conflict):
        if await artifacts.kept(ctx, doc.workspace, doc.artifact) is not None:
            return
    await ctx.change(Model, doc.id, lambda d: (d.evolve(deleted=True, marks=(), made_by=None),
                                               (Fact("model.deleted"),)), workspace=doc.workspace)
    await settle(ctx, doc.workspace, doc.name)
    raise Conflict(f"{doc.artifact} was being removed; upload it again, then register", code="being-removed",
                   retry_after=1)
