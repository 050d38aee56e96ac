"""A base image where none can be pulled: Debian with its own Python, made from Debian's packages by mmdebstrap, or by
debootstrap where only that is there.

The same packages give the same bytes: members in the order of names, no time later than SOURCE_DATE_EPOCH, Python's own
library compiled without times in it. What apt was told of mirrors stays out of it, unless a mirror was given.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from ..core.errors import BuildFailed, Invalid, Unavailable
from .debian_image import LEFT_OUT, Layers, write
from .workplace import Told, ran, workplace

EPOCH = 1767225600
"""The time of files that are made while it is put together, where SOURCE_DATE_EPOCH says none."""
PACKAGES = ("python3", "ca-certificates", "libstdc++6")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
COMPILE = "python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib/python3.[0-9]*"
OLDEST = 11
WORD = re.compile(r"[a-z0-9][a-z0-9+.\-]*\Z")
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Recipe:
    """What a base is made of. Raises Invalid, with every problem."""

    suite: str = "bookworm"
    packages: tuple[str, ...] = ()
    mirror: str | None = None

    def __post_init__(self) -> None:
        wrong = [f"'{name}' is not the name of a package of Debian" for name in self.packages if not WORD.match(name)]
        if not WORD.match(self.suite):
            wrong.append(f"'{self.suite}' is not a suite of Debian, such as bookworm")
        if self.mirror is not None:
            url = urlsplit(self.mirror)
            if url.username or url.password:
                wrong.append("credentials in a mirror's URL are refused: they would stand in the image")
            elif url.scheme not in ("http", "https", "file") or set(self.mirror) & set(" \t\n"):
                wrong.append("a mirror is a URL: https://HOST/debian")
        if wrong:
            raise Invalid("; ".join(wrong), errors=[{"field": "base", "message": text} for text in wrong])

    @property
    def all(self) -> tuple[str, ...]:
        """Every package that is named, once."""
        return tuple(dict.fromkeys((*PACKAGES, *self.packages)))

    def steps(self) -> list[tuple[Recipe, str]]:
        """What each layer holds when it lies on those before it, and how that is told: the packages that were asked
        for are a layer of their own, so bases of one suite share the first."""
        plain = replace(self, packages=())
        more = [name for name in self.all if name not in PACKAGES]
        told = [(plain, f"Debian {self.suite}: {' '.join(PACKAGES)}")]
        return [*told, (self, f"packages: {' '.join(more)}")] if more else told


@dataclass(frozen=True)
class Made:
    """``reference`` is what ``--base`` takes."""

    reference: str
    python: str
    size: int


def machine() -> str:
    """This machine's architecture as images and Debian call it; as the kernel does where we build no images."""
    return MACHINES.get(platform.machine(), platform.machine())


def missing() -> str:
    """Why it cannot be made on this machine, with what to do; "" when it can."""
    if platform.machine() not in MACHINES:
        return f"images are made for x86-64 and arm64; this machine is {platform.machine()}"
    if _program("mmdebstrap") is None and _program("debootstrap") is None:
        return "neither mmdebstrap nor debootstrap is installed; on Debian and Ubuntu: apt-get install mmdebstrap"
    if os.geteuid() == 0:
        return ""
    if _program("mmdebstrap") is None:
        return "debootstrap needs root: run this as root, or install mmdebstrap: apt-get install mmdebstrap uidmap"
    lacking = [f"{name} (package {package})" for name, package in (("unshare", "util-linux"), ("newuidmap", "uidmap"))
               if _program(name) is None]
    how = "install that, or run this as root"
    return f"without root, mmdebstrap needs {' and '.join(lacking)}: {how}" if lacking else ""


def make(to: Path, recipe: Recipe, told: Told) -> Made:
    """Makes the OCI layout ``to``, with the tag ``latest``, whole or not at all (20-60 s with a mirror near).

    Raises Invalid for a place that cannot be, Unavailable for what this machine lacks, BuildFailed with the tool's
    words.
    """
    to = to.absolute()
    if os.path.lexists(to):
        raise Invalid(f"'{to}' is there already; give another place", field="to")
    if set(str(to)) & set(":?#@") or ".." in to.parts:
        raise Invalid(f"'{to}' cannot be a base's folder: a reference has no : ? # @ or .. in it", field="to")
    epoch = _epoch()
    if reason := missing():
        raise Unavailable(reason)
    to.parent.mkdir(parents=True, exist_ok=True)
    with workplace(to, ("root.tar", "more.tar", "root", "layout"), told) as place:
        roots, steps, layout = (place / "root.tar", place / "more.tar"), recipe.steps(), place / "layout"
        for root, (step, what) in zip(roots, steps, strict=False):
            told(what)
            (_mmdebstrap if _program("mmdebstrap") else _debootstrap)(step, root, epoch, told)
        told("packing it")
        layers = Layers(roots[:len(steps)], tuple(what for _, what in steps), recipe.mirror is not None, epoch)
        python, size = write(layout, layers, machine())
        if python < OLDEST:
            raise BuildFailed(f"Debian {recipe.suite} has {f'Python 3.{python}' if python else 'no Python'}; images "
                              f"need 3.{OLDEST} or newer: give a newer suite")
        layout.rename(to)
    return Made(f"oci-layout://{to}:latest", f"3.{python}", size)


def _epoch() -> int:
    said = os.environ.get("SOURCE_DATE_EPOCH") or str(EPOCH)
    if not said.isdecimal() or len(said) > 10:
        raise Invalid(f"SOURCE_DATE_EPOCH is '{said}': it is a number of seconds", field="SOURCE_DATE_EPOCH")
    return int(said)


# -- the two tools ----------------------------------------------------------------------------------------------------


def _program(name: str) -> str | None:
    """Its path; people's own PATH often lacks the folders of root's programs."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _mmdebstrap(recipe: Recipe, root: Path, epoch: int, told: Told) -> None:
    excluded = [f"--dpkgopt=path-exclude=/{path}/*" for path in LEFT_OUT if path.startswith("usr/share/")]
    _run([_program("mmdebstrap") or "mmdebstrap", f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
          "--variant=essential", f"--include={','.join(recipe.all)}", *excluded,
          f"--customize-hook=chroot \"$1\" sh -c '{COMPILE}' || true", recipe.suite, str(root),
          *([recipe.mirror] if recipe.mirror else [])], epoch, told)


def _debootstrap(recipe: Recipe, root: Path, epoch: int, told: Told) -> None:
    folder = root.with_name("root")
    shutil.rmtree(folder, ignore_errors=True)
    _run([_program("debootstrap") or "debootstrap", "--variant=minbase", f"--include={','.join(recipe.all)}",
          recipe.suite, str(folder), *([recipe.mirror] if recipe.mirror else [])], epoch, told)
    told("compiling Python's library")
    ran([_program("chroot") or "chroot", str(folder), "sh", "-c", COMPILE], os.environ, told, LIMIT_S)  # may fail
    with tarfile.open(root, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(folder, ".", filter=_unmounted)


def _unmounted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Nothing of the machine's own, should it still be mounted there; no names of owners, which are this machine's."""
    member.uname = member.gname = ""
    return None if member.name.startswith(("./proc/", "./sys/", "./dev/")) else member


def _run(argv: Sequence[str], epoch: int, told: Told) -> None:
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    code, said = ran(argv, env, told, LIMIT_S)
    if code:
        raise BuildFailed("\n".join([f"{Path(argv[0]).name} failed ({code}); it said at the end:", *said]))
