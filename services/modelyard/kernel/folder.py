"""The data folder: made for one user, of one version, used by one process a service."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from ..core.errors import Conflict, Invalid

VERSION = "1"
SIGNING_KEY = "signing.key"
"""May lie in a folder before it is ours: its owner wants images signed by it."""


def prepare(data: Path) -> None:
    """Makes the folder (0700) or takes the one that is there. Invalid when it cannot be used, saying why."""
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(data, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(data))
        if not (data / "VERSION").exists():
            _ours(data)
            write_once(data / "VERSION", VERSION + "\n")
        data.chmod(0o700)
        (data / "locks").mkdir(mode=0o700, exist_ok=True)
        version = (data / "VERSION").read_text().strip()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise Invalid(f"the data folder {data} cannot be used: {why}; name another with --data (MODELYARD_DATA), or "
                      "make this one writable for this user", code="data-folder", field="data") from exc
    if not version.isdigit() or int(version) > int(VERSION):
        raise Invalid(f"the data folder {data} is of version '{version}', made by a newer Modelyard; this one knows "
                      f"version {VERSION}. Install the newer one, or name another folder with --data",
                      code="data-version", field="data")


def _ours(data: Path) -> None:
    """A folder without VERSION must be empty: nobody's home folder is taken over (and closed to others) by mistake.
    VERSION is always written first, so another process that is just starting here is not taken for a stranger."""
    strange = [name for name in os.listdir(data) if not name.startswith(".VERSION.") and name != SIGNING_KEY]
    if strange and not (data / "VERSION").exists():
        raise Invalid(f"the folder {data} is not empty and not a data folder of Modelyard (it holds "
                      f"'{sorted(strange)[0]}'); name an empty or a new folder with --data", code="data-folder",
                      field="data")


def write_once(path: Path, text: str) -> None:
    """Writes a file (0600) that appears whole or not at all; one that is there already stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)


def service_token(data: Path) -> str:
    """What the services on this folder show each other: made by the first of them, read by the rest."""
    path = data / "service.token"
    try:
        if not path.exists():
            write_once(path, secrets.token_urlsafe(32) + "\n")
        token = path.read_text().strip()
    except OSError as exc:
        raise Invalid(f"{path} cannot be read: {exc.strerror}", code="data-folder") from exc
    if not token:
        raise Invalid(f"{path} is empty; delete it and start every service again", code="data-folder")
    return token


def lock(data: Path, service: str) -> int:
    """Takes the service's place on this folder until the descriptor is closed or the process ends.

    Conflict when another process has it, naming its pid. Children do not inherit it.
    """
    path = data / "locks" / service
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise Conflict(f"another Modelyard (process {holder or 'unknown'}) already runs {service} on {data}; stop it, "
                       "or start this one on another folder with --data", code="data-in-use") from exc
    except OSError:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
