"""Run inside the sandbox, by the Python of the build's own environment: an sdist becomes a wheel (PEP 517).

``python sdist_hook.py SDIST GIVEN``: ``GIVEN`` is JSON, the requirements that the environment holds, or null for a
first look. What the build asks for beyond them goes to ``/out/needs.json``; with nothing missing the wheel goes to
``/out``, written again so that the same files are the same bytes. Standard library only; nothing of what it says is
trusted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

DEFAULT: dict[str, Any] = {"requires": ["setuptools>=40.8.0"], "build-backend": "setuptools.build_meta:__legacy__"}
SOURCE, DRAFT, OUT = Path("/tmp/source"), Path("/tmp/draft"), Path("/out")
WHEN = (1980, 1, 1, 0, 0, 0)


def main() -> None:
    """A first look, or the build."""
    sdist, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    root = unpacked(sdist)
    system = {**DEFAULT, "backend-path": [], **described(root)}
    needs = list(system["requires"])
    if given is not None and set(needs) <= set(given):
        backend = hooks(root, system)
        asked = getattr(backend, "get_requires_for_build_wheel", None)
        needs += asked() if asked is not None else []
        if set(needs) <= set(given):
            DRAFT.mkdir()
            name = backend.build_wheel(str(DRAFT))
            again(DRAFT / name, OUT / name)
            return
    (OUT / "needs.json").write_text(json.dumps([str(need) for need in needs]))


def unpacked(sdist: Path) -> Path:
    """The source's folder."""
    SOURCE.mkdir()
    if sdist.suffix == ".zip":
        with zipfile.ZipFile(sdist) as packed:
            packed.extractall(SOURCE)
    else:
        with tarfile.open(sdist) as archive:
            archive.extractall(SOURCE, filter="data")
    found = list(SOURCE.iterdir())
    if len(found) != 1 or not found[0].is_dir():
        sys.exit("this is no sdist: there must be one folder at its top, name-version")
    return found[0]


def described(root: Path) -> dict[str, Any]:
    """Its ``[build-system]``, as far as it says so."""
    file = root / "pyproject.toml"
    said = tomllib.loads(file.read_text(encoding="utf-8")).get("build-system", {}) if file.is_file() else {}
    if "build-backend" not in said:
        said = {"requires": said.get("requires", DEFAULT["requires"])}
        if not (root / "setup.py").is_file() and not file.is_file():
            sys.exit("this is no sdist: it has neither a pyproject.toml nor a setup.py")
    return said


def hooks(root: Path, system: dict[str, Any]) -> Any:
    """The build backend, with the source as the working directory."""
    os.chdir(root)
    sys.argv = ["setup.py"]
    sys.path[0:1] = [str(root / part) for part in system["backend-path"]]
    module, _, rest = system["build-backend"].partition(":")
    backend = importlib.import_module(module)
    for part in filter(None, rest.split(".")):
        backend = getattr(backend, part)
    return backend


def again(draft: Path, out: Path) -> None:
    """The same wheel whenever it is made: names in order, one time, two modes."""
    with zipfile.ZipFile(draft) as source, zipfile.ZipFile(out, "x") as target:
        for info in sorted(source.infolist(), key=lambda one: one.filename):
            if info.is_dir():
                continue
            entry = zipfile.ZipInfo(info.filename, WHEN)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if info.external_attr >> 16 & 0o100 else 0o100644) << 16
            target.writestr(entry, source.read(info))


if __name__ == "__main__":
    main()
