"""What runs an image for arm64 on an x86-64 machine: QEMU's emulator of one process, and a Debian for arm64.

    python -m infra.stack.arm64       # prints the folder: `qemu`, and `root.tar` with Debian's own Python

Neither is installed: both are kept beside the downloads, and the kernel is told nothing (no binfmt_misc), so what runs
emulated is the one process that was asked for. Debian's packages are only unpacked: their scripts could not run.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from .server import CACHE, StackError, apt_install, can_apt, needs, run

SUITE, VERSION = "bookworm", "1"
PACKAGES = "python3,libstdc++6"
HOME = CACHE / f"arm64-{SUITE}-{VERSION}"


def missing() -> str:
    """Why it cannot be had on this machine; "" when it can, or is there."""
    if platform.machine() != "x86_64":
        return f"the emulator is for x86-64; this machine is {platform.machine()}"
    if HOME.is_dir():
        return ""
    return can_apt() or needs(**{"dpkg-deb": "only Debian and its kin have it"})


def home() -> Path:
    """The folder; made when it is not there (10-60 s). StackError when it cannot be."""
    if HOME.is_dir():
        return HOME
    if reason := missing():
        raise StackError(f"arm64: {reason}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "arm64.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not HOME.is_dir():
            _make()
    return HOME


def _make() -> None:
    if needs(mmdebstrap=""):
        apt_install("mmdebstrap")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="arm64.") as made:
        folder, home = Path(made), Path(made) / "home"
        home.mkdir()
        os.chmod(folder, 0o755)  # apt reads as a user of its own
        try:
            run("apt-get", "download", "-qq", "qemu-user-static", cwd=folder)
        except StackError:
            run("apt-get", "update", "-qq")
            run("apt-get", "download", "-qq", "qemu-user-static", cwd=folder)
        (package,) = folder.glob("*.deb")
        run("dpkg-deb", "--extract", str(package), str(folder / "qemu"))
        shutil.copy(folder / "qemu/usr/bin/qemu-aarch64-static", home / "qemu")
        run("mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64", f"--include={PACKAGES}", SUITE,
            str(home / "root.tar"))
        home.rename(HOME)


if __name__ == "__main__":
    try:
        print(home())
    except StackError as exc:
        sys.exit(str(exc))
