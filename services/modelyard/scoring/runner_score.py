"""Runs a scoring file: ``init()`` once, ``run(data)`` for each call. The file is user code: nothing it does may
hurt more than its own call.

A file that defines ``run_batch(data)`` is asked by it. It gets what ``run`` would get by its annotation, but with the
rows of several calls, joined in the order in which the calls came, and returns one result with a row for each row it
was given: an array, a dict of arrays, a data frame, or a list with one element a row. Joined are arrays, dicts of
arrays, data frames, and bodies ``{"data": [row, …]}`` or bare lists of rows; a call of another form goes to ``run``,
and is refused where there is none. A result of another length fails all its calls. When ``run_batch`` raises for
several calls it is asked again for each half of them, until a bad one fails alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import Invalid
from .arguments import builder
from .calls import Asked, WrongRows
from .parts import NotByRows, Part, join, measure, split
from .runners import CannotStart, Runner, log_failure


class ScoreRunner(Runner):
    """Loads the file, calls ``init()`` if there is one, and finds out what ``run`` or ``run_batch`` wants."""

    def __init__(self, path: Path) -> None:
        module = _load(path)
        run, run_batch = getattr(module, "run", None), getattr(module, "run_batch", None)
        if not callable(run) and not callable(run_batch):
            raise CannotStart(f"{path.name} has no function run(data) or run_batch(data)")
        self._run: Any = run
        self._run_batch: Any = run_batch
        self.batched = callable(run_batch)
        try:
            self._build = builder(run, "run") if callable(run) else None
            self._build_rows = builder(run_batch, "run_batch", rows=True) if callable(run_batch) else None
        except Invalid as exc:
            raise CannotStart(f"{path.name}: {exc.message}") from exc
        kinds = {inspect.iscoroutinefunction(f) for f in (run, run_batch) if callable(f)}
        if len(kinds) > 1:
            raise CannotStart(f"{path.name}: run and run_batch must both be async, or neither")
        self.asynchronous = kinds.pop()
        _init(module, path)

    def run(self, asked: Asked) -> Any:
        assert self._build is not None
        argument = self._build(asked)
        return self._await(self._run, argument) if self.asynchronous else self._call(self._run, argument)

    def prepare(self, asked: Asked) -> Part:
        assert self._build_rows is not None
        part = measure(self._build_rows(asked))
        if part.key is not None:
            return part
        if self._build is None:
            raise Invalid("run_batch takes rows, one or more: an array, columns of equal length, or a JSON body "
                          '{"data": [row, …]}')
        return Part(self._build(asked))

    def one(self, part: Part) -> Any:
        function = self._run if part.key is None else self._run_batch
        if self.asynchronous:
            return self._await_one(function, part)
        result = self._call(function, part.inputs)
        return result if part.key is None else _rows(result, (part,))[0]

    def many(self, parts: Sequence[Part]) -> Any:
        joined = join([part.inputs for part in parts])
        return self._await_many(joined, parts) if self.asynchronous else _rows(self._run_batch(joined), parts)

    def _call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return function(argument)
        except BaseException:  # noqa: BLE001 - sys.exit and worse in user code end the call, not the server
            raise log_failure() from None

    async def _await(self, function: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return await function(argument)
        except asyncio.CancelledError:
            raise
        except BaseException:  # noqa: BLE001 - as in _call
            raise log_failure() from None

    async def _await_one(self, function: Callable[[Any], Any], part: Part) -> Any:
        result = await self._await(function, part.inputs)
        return result if part.key is None else _rows(result, (part,))[0]

    async def _await_many(self, joined: Any, parts: Sequence[Part]) -> list[Any]:
        return _rows(await self._run_batch(joined), parts)


def _rows(result: Any, parts: Sequence[Part]) -> list[Any]:
    try:
        return split(result, [part.rows for part in parts])
    except NotByRows as exc:
        raise WrongRows(f"what run_batch returned {exc}; it must return a row for each") from None


def _load(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CannotStart(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that pickles made by the file, and the file's own helpers, find it
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        raise CannotStart(f"{path.name} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    return module


def _init(module: Any, path: Path) -> None:
    init = getattr(module, "init", None)
    if init is None:
        return
    try:
        made = init()
        if inspect.iscoroutine(made):
            asyncio.run(made)
    except BaseException as exc:
        raise CannotStart(f"init() of {path.name} failed: {type(exc).__name__}: {exc}") from exc
