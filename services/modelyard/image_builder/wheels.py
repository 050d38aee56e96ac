"""An environment that was just installed, as layers: one for each large distribution, one for all the small ones.

What belongs to a distribution is what its RECORD lists. Left out is everything that differs from one installation
to the next, or that nothing in an image runs: installer notes, bytecode, console scripts, test suites.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from ..core.errors import BuildFailed
from .suites import suite
from .tarring import Entry

LARGE = 5_000_000
LONGEST = 120
"""Of a license's name: older packages put the whole text there."""
NOTES = frozenset({"INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json"})


@dataclass(frozen=True)
class Distribution:
    """One installed package: its files, as archive entries below ``site-packages``."""

    name: str
    version: str
    license: tuple[str, str]
    """``expression`` (SPDX) or ``license`` (a name), and what the metadata says; ("", "") where it says nothing."""
    tags: frozenset[str]
    """Of its wheel: ``cp311-cp311-manylinux_2_28_x86_64``."""
    size: int
    entries: tuple[Entry, ...]
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Of its files, by their names in an image, as its RECORD has them."""

    def told(self, sha256: str) -> dict[str, str]:
        """For the bill of materials. ``sha256`` of its wheel, "" where it is not known."""
        said = {"name": self.name, "version": self.version, "sha256": sha256, self.license[0]: self.license[1]}
        return {key: value for key, value in said.items() if key and value}


def site_packages(python: str) -> str:
    """Where packages lie in an image: ``opt/env/lib/python3.11/site-packages``."""
    return f"opt/env/lib/python{python}/site-packages"


def distributions(root: Path, python: str, left: Set[str] = frozenset()) -> list[Distribution]:
    """Everything that is installed in ``root`` (a ``--target`` folder), by name, without the test suites that are
    ``left`` out. Blocking."""
    found = [_distribution(root, info, python, left) for info in root.glob("*.dist-info")]
    return sorted(found, key=lambda d: d.name)


def clashing(found: Sequence[Distribution]) -> list[Distribution]:
    """Those that have a file of the same name as another one's, and with other contents. Of these the installer, which
    unpacks several at once, leaves whichever came last: it is another one every time."""
    contents: dict[str, set[str]] = {}
    for one in found:
        for name, digest in one.hashes.items():
            contents.setdefault(name, set()).add(digest)
    return [one for one in found if any(len(contents[name]) > 1 for name in one.hashes)]


def taken_from(found: Sequence[Distribution], again: Mapping[str, Path], python: str,
               left: Set[str] = frozenset()) -> list[Distribution]:
    """With the files of each distribution in ``again`` from there, where it was installed alone. Blocking."""
    alone = {name: {e.name: e for e in distributions(root, python, left)[0].entries} for name, root in again.items()}
    return [replace(one, entries=tuple(alone[one.name].get(e.name, e) for e in one.entries)) if one.name in alone
            else one for one in found]


def grouped(found: Iterable[Distribution]) -> list[tuple[str, list[Entry]]]:
    """Title and files of each layer, in the order of the image: the largest first, so that two workers end together."""
    large = sorted((d for d in found if d.size > LARGE), key=lambda d: (-d.size, d.name))
    small = [d for d in found if d.size <= LARGE]
    groups = [(f"env: {d.name} {d.version}", list(d.entries)) for d in large]
    if small:
        groups.append(("env: " + ", ".join(f"{d.name} {d.version}" for d in small), _joined(small)))
    return groups


def _joined(found: Iterable[Distribution]) -> list[Entry]:
    """Several packages' files; of a file that two of them own (a namespace's ``__init__``) the last one's."""
    return list({entry.name: entry for d in found for entry in d.entries}.values())


def _distribution(root: Path, info: Path, python: str, left: Set[str]) -> Distribution:
    about = HeaderParser().parsestr((info / "METADATA").read_text(encoding="utf-8", errors="replace"))
    rows = [row for row in csv.reader(io.StringIO((info / "RECORD").read_text(encoding="utf-8"))) if row]
    kept = sorted(row for row in rows if _belongs(row[0], info.name) and suite(row[0]) not in left)
    prefix = site_packages(python)
    entries, size = [], 0
    for name, *_ in kept:
        path = root / name
        status = path.stat()
        size += status.st_size
        entries.append(Entry(f"{prefix}/{name}", path, executable=bool(status.st_mode & 0o100)))
    entries.append(Entry(f"{prefix}/{info.name}/RECORD", _record(kept, info.name)))
    hashes = {f"{prefix}/{name}": digest for name, digest, *_ in kept if digest}
    return Distribution(about["Name"], about["Version"], _license(about), _tags(info), size, tuple(entries), hashes)


def _tags(info: Path) -> frozenset[str]:
    try:
        wheel = HeaderParser().parsestr((info / "WHEEL").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return frozenset()
    return frozenset(tag.strip() for tag in wheel.get_all("Tag") or ())


def _belongs(name: str, info: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        if path.parts[-2:-1] == ("bin",):
            return False
        raise BuildFailed(f"{info.removesuffix('.dist-info')} puts a file outside of its folder: {name}")
    if path.parts[0] == info and path.name in NOTES | {"RECORD"}:
        return False
    return path.parts[0] != "bin" and path.suffix not in (".pyc", ".pyo") and "__pycache__" not in path.parts


def _record(kept: list[list[str]], info: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([*kept, [f"{info}/RECORD", "", ""]])
    return out.getvalue().encode()


def _license(about: Message) -> tuple[str, str]:
    if expression := about.get("License-Expression"):
        return "expression", str(expression)
    named = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License :: ")]
    plain = ", ".join(n for n in named if n != "OSI Approved") or str(about.get("License") or "").strip()
    return ("license", plain.splitlines()[0][:LONGEST]) if plain else ("", "")
