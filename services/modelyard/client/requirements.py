"""Files that say what an image needs: requirements files, pyproject.toml, conda's environment.yml. They are read and
never run; what is wrong in them is told at once, each with its file and its line or entry."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..core.errors import Invalid
from ..core.requirements import constraint, logical, requirement

WITH_EXTRAS = re.compile(r"^(?P<path>.+\.toml)\[(?P<extras>[^\[\]]*)\]\Z")
INCLUDE = re.compile(r"^(?P<option>-r|-c|--requirement|--constraint)(?:\s*=\s*|\s+|(?<=-[rc]))(?P<path>\S.*)\Z")
EDITABLE = re.compile(r"^(-e|--editable)\b")
LOCAL = re.compile(r"^(\.{0,2}/|~|\.{1,2}\Z|file:)|^[^@;:\s]*\.(whl|zip|tar\.gz|tgz)\Z", re.IGNORECASE)
LOCAL_URL = re.compile(r"@\s*(file:|\.{0,2}/)", re.IGNORECASE)
HASH = re.compile(r"\s--hash[= ]")
CONDA = re.compile(r"^(?:[^\s:]+::)?(?P<name>[A-Za-z0-9._\-]+)\s*(?P<version>.*)\Z")
PYTHON = re.compile(r"^={0,2}\s*(?P<minor>3\.\d{1,2})(?:\.\d+|\.\*|\*)*(?:=\S*)?\Z")
LIMIT = 1_000_000


@dataclass(frozen=True)
class Needs:
    """What a file asks for. ``constraints`` bound what is installed and install nothing; ``python`` is a minor
    version, where the file says one."""

    requirements: list[str] | None = None
    constraints: list[str] | None = None
    python: str | None = None


def read_requirements(given: Sequence[str] | str | Path | None) -> Needs:
    """A list as it is; a requirements file with the files that it includes; ``pyproject.toml``, with extras as
    ``pyproject.toml[EXTRA,…]``; a conda environment (``.yml``), of which pip's part and the Python are taken.

    Raises Invalid with every problem: file, line or entry, and what to do.
    """
    if given is None or not isinstance(given, (str, Path)):
        return Needs(None if given is None else list(given))
    reader = _Reader()
    named = WITH_EXTRAS.match(str(given))
    path = Path(named["path"] if named else given)
    if path.suffix == ".toml":
        reader.project(path, [e.strip() for e in named["extras"].split(",") if e.strip()] if named else [])
    elif path.suffix.lower() in (".yml", ".yaml"):
        reader.conda(path)
    else:
        reader.file(path, reader.take)
    if reader.problems:
        errors = [{"field": "requirements", "message": problem} for problem in reader.problems]
        raise Invalid("; ".join(reader.problems), field="requirements", errors=errors)
    return Needs(list(dict.fromkeys(reader.taken)), list(dict.fromkeys(reader.bounds)) or None, reader.python)


def has_project(path: Path) -> bool:
    """Whether a ``pyproject.toml`` is of a project: many hold only the settings of tools."""
    return "project" in _Reader().toml(path)


Take = Callable[[str, str], None]
"""Keeps a line: where it stands, what it says."""


@dataclass
class _Reader:
    taken: list[str] = field(default_factory=list)
    bounds: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    python: str | None = None
    _open: list[Path] = field(default_factory=list)

    def take(self, where: str, line: str) -> None:
        """A requirement, if it is one that an image can have."""
        self._kept(where, line, requirement, self.taken)

    def bound(self, where: str, line: str) -> None:
        """A constraint."""
        self._kept(where, line, constraint, self.bounds)

    def _kept(self, where: str, line: str, check: Callable[[str], tuple[str, str]], into: list[str]) -> None:
        if why := _refused(line) or check(line)[1]:
            self.problems.append(f"{where}: {why}")
        else:
            into.append(line)

    def text(self, path: Path) -> str:
        """A file's text; "" and a problem where it cannot be read."""
        try:
            with path.open("rb") as file:
                data = file.read(LIMIT + 1)
            if len(data) > LIMIT:
                self.problems.append(f"'{path}' has more than {LIMIT} bytes: it is no list of requirements")
                return ""
            return data.decode("utf-8-sig")
        except OSError as exc:
            self.problems.append(f"cannot read '{path}': {exc.strerror or exc}")
        except UnicodeDecodeError:
            self.problems.append(f"'{path}' is not UTF-8 text")
        return ""

    # -- requirements.txt -------------------------------------------------------------------------------------------

    def file(self, path: Path, take: Take) -> None:
        """A requirements or constraints file, and what it includes."""
        self._open.append(path.resolve())
        for number, line in logical(self.text(path)):
            self.line(f"{path} line {number}", line, path.parent, take)
        self._open.pop()

    def line(self, where: str, line: str, folder: Path, take: Take) -> None:
        """One line of such a file; paths in it begin at ``folder``."""
        included = INCLUDE.match(line)
        if included is None:
            take(where, line)
            return
        path = Path(os.path.normpath(folder / included["path"].strip("'\"")))
        if "://" in included["path"]:
            self.problems.append(f"{where}: only files beside this one can be included, not URLs")
        elif path.resolve() in self._open:
            self.problems.append(f"{where}: '{path}' includes itself")
        elif not path.is_file():
            self.problems.append(f"{where}: there is no file '{path}'")
        else:
            self.file(path, self.bound if included["option"] in ("-c", "--constraint") else take)

    # -- pyproject.toml ---------------------------------------------------------------------------------------------

    def toml(self, path: Path) -> dict[str, Any]:
        """A TOML file; empty, and a problem, where it is none."""
        try:
            return tomllib.loads(self.text(path))
        except (tomllib.TOMLDecodeError, RecursionError) as exc:
            self.problems.append(f"'{path}' is not TOML: {exc}")
            return {}

    def project(self, path: Path, extras: Sequence[str]) -> None:
        """``[project].dependencies`` and those of ``extras``, with the extras of its own that these name."""
        whole = self.toml(path)
        project = whole.get("project")
        if not isinstance(project, dict):
            if not self.problems:
                self.problems.append(f"'{path}' has no [project] table, where dependencies are listed; write them "
                                     "there or in a requirements.txt")
            return
        for name in ("dependencies", "optional-dependencies"):
            if name in _listed(project.get("dynamic")) and (name == "dependencies" or extras):
                self.problems.append(f"{path}: its {name} are dynamic, known only to its build; write them in a "
                                     "requirements.txt")
        self._entries(f"{path} project.dependencies", project.get("dependencies", []), self.take)
        self._extras(path, project, extras)

    def _extras(self, path: Path, project: dict[str, Any], extras: Sequence[str]) -> None:
        optional = project.get("optional-dependencies") or {}
        if not isinstance(optional, dict):
            self.problems.append(f"{path} project.optional-dependencies: is not a table")
            return
        known = {canonicalize_name(name): name for name in optional}
        own, wanted = canonicalize_name(str(project.get("name", ""))), list(map(canonicalize_name, extras))

        def take(where: str, line: str) -> None:
            text, why = requirement(line)
            parsed = None if why else Requirement(text)
            if parsed is not None and canonicalize_name(parsed.name) == own and parsed.extras:
                wanted.extend(e for e in sorted(map(canonicalize_name, parsed.extras)) if e not in wanted)
            else:
                self.take(where, line)

        for extra in wanted:  # grows while extras name others
            if extra in known:
                self._entries(f"{path} project.optional-dependencies.{known[extra]}", optional[known[extra]], take)
            else:
                self.problems.append(f"{path}: there is no extra '{extra}'; it has: "
                                     f"{', '.join(sorted(optional)) or 'none'}")

    def _entries(self, where: str, entries: Any, take: Take) -> None:
        if not isinstance(entries, list):
            self.problems.append(f"{where}: is not a list")
            return
        for number, entry in enumerate(entries, start=1):
            if isinstance(entry, str):
                take(f"{where} entry {number}", entry.strip())
            else:
                self.problems.append(f"{where} entry {number}: is not text")

    # -- environment.yml --------------------------------------------------------------------------------------------

    def conda(self, path: Path) -> None:
        """pip's part and the Python of a conda environment. Its other packages are told, for a package of that name on
        the index may be another one, or the same without the libraries that it needs."""
        stranded = []
        for line, node in self._environment(path):
            where = f"{path} line {line}"
            if isinstance(node, yaml.MappingNode):
                self._pip(path, node)
                continue
            said = CONDA.match(str(node.value).strip()) if isinstance(node, yaml.ScalarNode) else None
            if said is None:
                self.problems.append(f"{where}: is neither a package nor pip's part")
            elif said["name"].lower() == "python":
                self._python(where, said["version"].strip())
            elif said["name"].lower() != "pip":
                stranded.append(f"{said['name']} (line {line})")
        if stranded:
            self.problems.append(
                f"{path} asks for packages of conda, which an image cannot have from it: {', '.join(stranded)}; write "
                "those that the package index has into the pip: part, under their names there, and have the rest "
                "(libraries and tools of the system) in the base image")

    def _environment(self, path: Path) -> Iterator[tuple[int, yaml.Node]]:
        """The entries of ``dependencies``, each with its line."""
        try:
            whole = yaml.compose(self.text(path), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as exc:
            self.problems.append(f"'{path}' is not YAML: {' '.join(str(exc).split())}")
            return
        listed = _of(whole, "dependencies")
        if isinstance(listed, yaml.SequenceNode):
            yield from ((node.start_mark.line + 1, node) for node in listed.value)
        elif not self.problems:
            self.problems.append(f"'{path}' has no list of dependencies: is it a conda environment?")

    def _pip(self, path: Path, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            where = f"{path} line {key.start_mark.line + 1}"
            if key.value != "pip" or not isinstance(value, yaml.SequenceNode):
                self.problems.append(f"{where}: only pip: and a list can stand here")
                continue
            for entry in value.value:
                at = f"{path} line {entry.start_mark.line + 1}"
                if isinstance(entry, yaml.ScalarNode):
                    for _, line in logical(str(entry.value)):
                        self.line(at, line, path.parent, self.take)
                else:
                    self.problems.append(f"{at}: is not text")

    def _python(self, where: str, version: str) -> None:
        said = PYTHON.match(version)
        if said is not None:
            self.python = said["minor"]
        elif version:
            self.problems.append(f"{where}: python {version} is not one version of Python 3; an image has one: "
                                 "python=3.11")


def _of(node: yaml.Node | None, name: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for key, value in node.value if key.value == name), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refused(line: str) -> str:
    """What a requirements file may hold for pip and a request may not hold, or ""."""
    if EDITABLE.match(line):
        return "editable installs are not taken: the image builder has no such folder; put the code beside score.py"
    if line.startswith("-"):
        return (f"the option {re.split(r'[ =]', line)[0]} is not taken; indexes and wheel folders are settings of the "
                "image builder")
    if HASH.search(line):
        return "hashes belong into a lock; give the file as one: images build --lock FILE"
    if "--" in line.partition("#")[0] and re.search(r"\s--[a-z]", line):
        return "options behind a requirement are not taken"
    if LOCAL.search(line) or LOCAL_URL.search(line):
        return ("paths on this machine are not taken: the image builder does not have them; give a name that its "
                "index has, or put the code beside score.py")
    return ""
