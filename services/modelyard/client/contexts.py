"""A folder with a Dockerfile on its way to the yard: what its ``.dockerignore`` names stays here."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import Invalid
from .http import Http
from .uploads import Artifact, OnProgress, inspect, upload

NAME, IGNORED = "Dockerfile", ".dockerignore"


async def upload_context(http: Http, source: Path, on_progress: OnProgress | None = None, *,
                         dry_run: bool = False) -> Artifact:
    """As ``upload``, of a folder with a Dockerfile at its top, or of that file alone, whatever it is called."""
    with tempfile.TemporaryDirectory(prefix="modelyard-context-", ignore_cleanup_errors=True) as place:
        try:
            await asyncio.to_thread(_stage, source, Path(place))
        except OSError as exc:
            raise Invalid(f"cannot read '{source}': {exc.strerror or exc}", field="dockerfile") from exc
        if dry_run:
            return (await asyncio.to_thread(inspect, Path(place), on_progress))[0]
        return await upload(http, Path(place), on_progress)


def _stage(source: Path, place: Path) -> None:
    """What of the folder is sent, linked into ``place``. Blocking."""
    if source.is_file():
        _linked(source, place / NAME)
        return
    if not (source / NAME).is_file():
        raise Invalid(f"there is no {NAME} in '{source}'", field="dockerfile")
    rules = source / IGNORED
    ignores = Ignores(rules.read_text(encoding="utf-8", errors="replace") if rules.is_file() else "")
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        if name == NAME or not ignores.covers(name):
            _linked(path, place / name)


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from (Path(root) / name for name in sorted((*files, *links)))


def _linked(path: Path, to: Path) -> None:
    if path.is_symlink():
        raise Invalid(f"'{path}' is a link; put a copy there, or name it in {IGNORED} (links are not sent)",
                      field="dockerfile")
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copy(path, to)


class Ignores:
    """The rules of a ``.dockerignore``: the last one that fits counts, and a folder's rule is that of all in it."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        for line in text.lstrip("\ufeff").splitlines():
            rule = line.strip()
            if not rule or line.startswith("#"):
                continue
            keep = rule.startswith("!")
            pattern = os.path.normpath(rule.removeprefix("!").strip()).lstrip("/")
            if pattern not in ("", "."):
                self._rules.append((keep, re.compile(_regex(pattern) + r"(?:/.*)?\Z", re.DOTALL)))

    def covers(self, name: str) -> bool:
        """Whether the file stays where it is. ``name`` is its path below the folder."""
        covered = False
        for keep, pattern in self._rules:
            if pattern.match(name):
                covered = not keep
        return covered


def _regex(pattern: str) -> str:
    """``**`` is any number of folders, ``*`` and ``?`` stay within one name, ``[a-c]`` is one of these letters."""
    out, at = "", 0
    while at < len(pattern):
        letter = pattern[at]
        if pattern.startswith("**", at):
            at += 3 if pattern.startswith("**/", at) else 2
            out += "(?:.*/)?" if pattern[at - 1] == "/" else ".*"
            continue
        if letter == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1:end].replace("\\", "\\\\")
            out += f"[{'^' + inside[1:] if inside[0] in '^!' else inside}]"
            at = end + 1
            continue
        if letter == "\\" and at + 1 < len(pattern):
            at += 1
            letter = pattern[at]
            out += re.escape(letter)
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(letter) or re.escape(letter)
        at += 1
    return out

