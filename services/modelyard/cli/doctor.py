"""modelyard doctor: what is reachable, what is missing, the line to fix it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ModelyardError
from .options import Output, connect
from .show import Column, Format, documents

if TYPE_CHECKING:
    from ..settings import Settings

ROUTES = {
    "registry": "/v1/models?limit=1", "image-builder": "/v1/images?limit=1", "deployer": "/v1/deployments?limit=1",
    "telemetry": "/v1/telemetry/doctor", "events": "/v1/events?after=end&follow=false",
}
ROOM_BYTES = 2 * 10**9
WAITING_S = 60.0
TROUBLE = "cannot ship: "
UNREADABLE = re.compile(r'^modelyard_documents_unreadable\{kind="([^"]+)",service="([^"]+)"\} (\S+)$', re.MULTILINE)
COLUMNS: list[Column] = ["ok", "check", "found", "fix"]


Config = Annotated[Path | None, typer.Option(dir_okay=False, help="The settings file: ./modelyard.toml if there.")]


def doctor(config: Config = None, output: Output = Format.table) -> None:
    """Looks at this machine, at what the settings name, and at the yard; exit 1 when something is missing. A warning
    says what else would be possible.

    Example: modelyard doctor --config modelyard.toml
    """
    rows = [_python(), _machine(), _uv(), _sandbox(), *_settings(config), *_yard()]
    documents(rows, COLUMNS, output)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _row(check: str, ok: bool, found: str, fix: str = "") -> dict[str, Any]:
    return {"ok": ok, "check": check, "found": found, "fix": "" if ok else fix}


def _python() -> dict[str, Any]:
    return _row("python", sys.version_info >= (3, 11), f"{platform.python_version()} at {sys.executable}",
                "install Python 3.11 or newer")


def _machine() -> dict[str, Any]:
    here = f"{platform.system()} {platform.machine()}"
    fits = here.lower() in ("linux x86_64", "linux aarch64", "linux arm64", "linux amd64")
    return _row("machine", fits, here, "serve on Linux (x86-64 or arm64); the SDK and this command work anywhere")


def _uv() -> dict[str, Any]:
    beside = Path(sys.executable).with_name("uv")
    where = str(beside) if beside.is_file() else shutil.which("uv")
    return _row("uv", where is not None, where or "not found", f"{sys.executable} -m pip install uv")


def _sandbox() -> dict[str, Any]:
    from ..image_builder.sandbox import trouble

    found, _, fix = trouble().partition("; ")
    if not found:
        return _row("build sandbox", True, "works: packages that exist only as source can be built")
    return {**_row("build sandbox", True, f"warning: packages come as wheels only; {found}"), "fix": fix}


def _settings(config: Path | None) -> list[dict[str, Any]]:
    from ..settings import load

    try:
        settings = load(config)
    except ModelyardError as exc:
        return [_row("settings", False, exc.message, "mend MODELYARD_* in the environment, or modelyard.toml")]
    folder = settings.data
    there = next(p for p in (folder, *folder.parents) if p.exists())
    writable, free = os.access(there, os.W_OK | os.X_OK), shutil.disk_usage(there).free
    return [
        _row("settings", True, "valid"),
        _row("data folder", writable, str(folder), "modelyard serve --data DIR, with a folder that you may write to"),
        _row("disk", free > ROOM_BYTES, f"{free / 1e9:.1f} GB free", f"free some space below {there}"),
        *_outside(settings),
        *_capture(folder),
    ]


def _outside(settings: Settings) -> list[dict[str, Any]]:
    """Store, bus, blobs, images and targets, opened as a service would open them. A data folder that was never used
    stays unmade."""
    import asyncio

    from ..node import look

    seen = asyncio.run(look(settings, servers_only=not settings.data.exists()))
    return [_row(thing.name, not thing.trouble, thing.url, thing.trouble) for thing in seen]


def _capture(data: Path) -> list[dict[str, Any]]:
    """A row for each deployment of this machine whose captured calls cannot leave it: what its shipper said last."""
    rows, before = [], time.time() - WAITING_S
    for run in sorted(data.glob("run/*/*")):
        log, waiting = run / "logs" / "shipper.log", []
        with contextlib.suppress(OSError):  # they are shipped this moment, or not ours to read
            waiting = [path.stat().st_mtime for path in run.glob("spool/*.seg")]
        if waiting and min(waiting) < before:
            said = log.read_text(errors="replace").splitlines() if log.is_file() else []
            why = next((line.partition(TROUBLE)[2] for line in reversed(said) if TROUBLE in line), "")
            rows.append(_row(f"capture {run.name}", False, f"{len(waiting)} segments wait to be shipped", (
                f"{why or 'its shipper does not run'}; a deployer that runs renews its grant (modelyard serve), once "
                "the blob store lets it")))
    return rows


def _yard() -> list[dict[str, Any]]:
    with connect() as yard:
        rows = [_asked("yard", yard.ready, lambda _: yard.url)]
        if not rows[0]["ok"]:
            return rows
        for service, route in ROUTES.items():
            rows.append(_asked(service, partial(yard.ask, route), lambda _: "answers"))
        rows.append(_asked("dead letters", lambda: len(yard.dead.list(limit=100)), lambda n: f"{n}"))
        if rows[-1]["ok"] and rows[-1]["found"] != "0":
            rows[-1] |= {"ok": False, "fix": "modelyard dead list"}
        rows += _unreadable(lambda: yard.ask("/metrics"))
    return rows


def _unreadable(ask: Callable[[], str]) -> list[dict[str, Any]]:
    """A row for each kind of document that the asked process met and could not read."""
    try:
        met = UNREADABLE.findall(ask())
    except ModelyardError as exc:
        return [_row("documents", False, exc.message)]
    return [_row(f"documents of {service}", False, f"{int(float(count))} of kind {kind} cannot be read",
                 "the log of the service names them; run the version of Modelyard that wrote them, or a newer one")
            for kind, service, count in met if float(count)]


def _asked(check: str, ask: Callable[[], Any], told: Callable[[Any], str]) -> dict[str, Any]:
    from ..core.errors import NotFound

    try:
        return _row(check, True, told(ask()))
    except NotFound:
        return _row(check, True, "answers")
    except ModelyardError as exc:
        message, _, fix = exc.message.partition("; ")
        return _row(check, False, message, fix.removeprefix("start it with: ") or str(exc.detail.get("help") or ""))
