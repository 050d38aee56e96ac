"""Runs a scoring file: ``init()`` once, ``run(data)`` for each call. The file is user code: nothing it does may
hurt more than its own call."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.errors import Invalid
from .arguments import builder
from .calls import Asked
from .runners import CannotStart, Runner, log_failure


class ScoreRunner(Runner):
    """Loads the file, calls ``init()`` if there is one, and finds out what ``run`` wants."""

    def __init__(self, path: Path) -> None:
        module = _load(path)
        run = getattr(module, "run", None)
        if not callable(run):
            raise CannotStart(f"{path.name} has no function run(data)")
        try:
            self._build = builder(run)
        except Invalid as exc:
            raise CannotStart(f"{path.name}: {exc.message}") from exc
        self._run: Callable[[Any], Any] = run
        self.asynchronous = inspect.iscoroutinefunction(run)
        _init(module, path)

    def run(self, asked: Asked) -> Any:
        argument = self._build(asked)
        if self.asynchronous:
            return self._await(argument)
        try:
            return self._run(argument)
        except BaseException:  # noqa: BLE001 - sys.exit and worse in user code end the call, not the server
            raise log_failure() from None

    async def _await(self, argument: Any) -> Any:
        try:
            return await self._run(argument)
        except asyncio.CancelledError:
            raise
        except BaseException:  # noqa: BLE001 - as in run
            raise log_failure() from None


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
