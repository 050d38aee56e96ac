"""Which version of a name is the latest: the highest that lives. It is marked, so that lists find it by an index.

Whoever makes or deletes a version settles it, and the event of either sees to it that this was done. What a process
remembers here only saves looks: a number that was taken meanwhile, or a document that was changed, is a Conflict, and
then it looks.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ..core.errors import Conflict
from ..kernel.service import Context
from ..ports.store import DocumentStore
from .model import Model, latest_marks, versions_of

MOST = 1000


@dataclass(eq=False)
class _Name:
    """What this process remembers of one name."""

    taken: int = 0
    """The highest number that is known to be taken."""
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: int = 0
    done: int = 0
    """Of those who ask to have it settled: how many came, and how many of them were there when a look began that
    has ended well."""
    made: list[Model] = field(default_factory=list)
    """Made by this process, and not settled yet."""
    look: bool = False
    """Somebody asks who made nothing here: what is remembered is not enough."""
    latest: Model | None = None
    """Left as the only one that is marked, as it was then."""
    settled: int = 0
    """Behind the commits of all versions up to this one it was settled here."""


_KNOWN: WeakKeyDictionary[DocumentStore, OrderedDict[tuple[str, str], _Name]] = WeakKeyDictionary()


def _known(ctx: Context, workspace: str, name: str) -> _Name:
    names = _KNOWN.setdefault(ctx.store, OrderedDict())
    about = names.setdefault((workspace, name), _Name())
    names.move_to_end((workspace, name))
    if len(names) > MOST:
        names.popitem(last=False)
    return about


async def highest(ctx: Context, workspace: str, name: str, tombstones: bool = False) -> Model | None:
    """The highest version of a name: the highest that lives, or (``tombstones``) that ever was."""
    found = await ctx.store.find(Model, {"place": versions_of(name)}, workspace=workspace, order="-place", limit=1,
                                 tombstones=tombstones)
    return found[0] if found else None


async def next_number(ctx: Context, workspace: str, name: str, *, look: bool) -> int:
    """What to try: numbers have no gap, so the one behind a number that is taken is free or taken as well. ``look``:
    it was taken."""
    about = _known(ctx, workspace, name)
    if look or not about.taken:
        top = await highest(ctx, workspace, name, tombstones=True)
        about.taken = top.version if top is not None else 0
    return about.taken + 1


def took(ctx: Context, doc: Model) -> None:
    about = _known(ctx, doc.workspace, doc.name)
    about.taken = max(about.taken, doc.version)


async def settle(ctx: Context, workspace: str, name: str, made: Model | None = None) -> None:
    """Marks the highest living version as the latest, and no other. ``made``: the version that was just made here.

    One does it for all who asked before he began: however many come at once, they cost what a few cost.
    """
    about = _known(ctx, workspace, name)
    about.asked += 1
    mine = about.asked
    if made is None:
        about.look = True
    else:
        about.made.append(made)
    async with about.alone:
        if about.done < mine:
            await _settle(ctx, workspace, name, about)


async def settled(ctx: Context, workspace: str, name: str, version: int) -> None:
    """Settles it, unless this process has done so since the commit of this version."""
    about = _known(ctx, workspace, name)
    async with about.alone:  # it may be at it
        done = version <= about.settled
    if not done:
        await settle(ctx, workspace, name)


async def _settle(ctx: Context, workspace: str, name: str, about: _Name) -> None:
    asked, made, look, latest = about.asked, about.made, about.look, about.latest
    about.made, about.look, about.latest = [], False, None  # an attempt that fails leaves nothing to rely on
    top = None if look else await _follow(ctx, latest, made)
    about.latest = top or await _look(ctx, workspace, name)
    about.done = asked
    about.settled = max([about.settled, *(doc.version for doc in made)])


async def _follow(ctx: Context, latest: Model | None, made: list[Model]) -> Model | None:
    """The usual case: what was made here follows on what was left here as the latest, so it is known what to unmark.
    Looks at the top once that is done. The latest, or None when it is not that simple."""
    line = sorted([*made, *([latest] if latest is not None else [])], key=lambda doc: doc.version)
    first = latest.version if latest is not None else 1
    if not made or [doc.version for doc in line] != [*range(first, first + len(line))]:
        return None
    *older, newest = line
    if not await _mark(ctx, older, ()):
        return None
    top = await highest(ctx, newest.workspace, newest.name)
    return top if top is not None and top.id == newest.id and top.marks else None


async def _look(ctx: Context, workspace: str, name: str) -> Model | None:
    """Looks again until a look finds nothing to do, so whoever comes last leaves it right. The marks are read before
    the top: what is marked behind them is not taken for an old one."""
    while True:
        marked = await ctx.store.find(Model, {"marks": latest_marks(name)[1]}, workspace=workspace)
        top = await highest(ctx, workspace, name)
        wrong_ones = [doc for doc in marked if top is None or doc.id != top.id]
        if not wrong_ones and (top is None or top.marks):
            return top
        await _mark(ctx, wrong_ones, ())
        if top is not None and not top.marks:
            await _mark(ctx, [top], latest_marks(name))


async def _mark(ctx: Context, docs: list[Model], marks: tuple[str, ...]) -> bool:
    """Whether none of them had changed. One that was changed or deleted meanwhile is left: it is looked at again."""
    results = await asyncio.gather(*(ctx.commit(doc.evolve(marks=marks)) for doc in docs), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Conflict):
            raise result
    return not any(isinstance(result, Conflict) for result in results)
