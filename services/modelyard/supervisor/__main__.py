"""``python -m modelyard.supervisor RUN_DIR``: takes the folder and its ports, then goes on in the background.

Exits 0 when a supervisor is there and listens; else 3 with one JSON line that says why:
``{"error": "running"}``, ``{"error": "port", "port": 8080}``, ``{"error": "…"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from .control import LINE, Control
from .desired import read_json, write_json
from .supervise import Supervisor

KINDS = ("grpc", "rest")
LONGEST = 80
"""Bytes of the sockets' folder: a unix socket's path has at most 107, and their names take up to 25."""
SHORT = LONGEST - len("/modelyard-12345678")


def fail(**why: Any) -> NoReturn:
    print(json.dumps(why), flush=True)
    os._exit(3)


def main() -> None:
    if len(sys.argv) != 2:
        fail(error="usage: python -m modelyard.supervisor RUN_DIR")
    os.chdir(sys.argv[1])
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(error="running")
    want = read_json("desired.json")
    if want is None:
        fail(error="there is no desired.json")
    public = dict(listen(want))
    with contextlib.suppress(FileNotFoundError):
        os.unlink("control")
    control = socket.socket(socket.AF_UNIX)
    control.bind("control")
    control.listen(64)
    if os.fork():
        os._exit(0)
    background()
    sockets = private_sockets()
    try:
        asyncio.run(live(public, control, sockets))
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def listen(want: dict[str, Any]) -> Iterator[tuple[str, socket.socket]]:
    """The public sockets: on the ports of this deployment, or, the first time, on free ones from then on."""
    kept = want.get("ports") or (read_json("ports.json") or {})
    taken: dict[str, int] = {}
    for kind in KINDS:
        if port := kept.get(kind):
            sock = bound(port)
            if sock is None:
                fail(error="port", port=port)
        else:
            sock = next((s for p in candidates(want) if (s := bound(p)) is not None), None)
            if sock is None:
                fail(error="no port is free")
        taken[kind] = sock.getsockname()[1]
        yield kind, sock
    write_json("ports.json", taken)


def bound(port: int) -> socket.socket | None:
    """A listening socket on loopback, or None when somebody has the port."""
    sock = socket.socket(socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(4096)
    except OSError:
        sock.close()
        return None
    return sock


def candidates(want: dict[str, Any]) -> Iterator[int]:
    """Ports to try: below those that the kernel gives to outgoing connections, which could take ours while we are
    away. Where to begin depends on the folder and the name, so that two deployments rarely want the same."""
    import hashlib

    try:
        top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        top = 32768
    low, span = (10240, top - 10240) if top > 12288 else (1024, top - 1024)
    first = int.from_bytes(hashlib.sha256(os.getcwd().encode()).digest()[:4])
    for i in range(span):
        yield low + (first + i) % span


def background() -> None:
    """Away from the caller's terminal, session and pipes. What Python itself says at a crash goes to a file."""
    os.setsid()
    os.makedirs("logs", mode=0o700, exist_ok=True)
    os.makedirs("spool", mode=0o700, exist_ok=True)
    null = os.open(os.devnull, os.O_RDWR)
    crash = os.open("logs/crash", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for fd, target in ((null, 0), (crash, 1), (crash, 2)):
        os.dup2(fd, target)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def private_sockets() -> Path:
    """A folder for replicas' sockets: here, or, where this path is too long for one, a short one elsewhere: in TMPDIR
    (a deployer in a container shares no other with the engine), or in /tmp, where that is too long as well."""
    before = read_json("sockets.json")
    if before is not None and Path(before["path"]).name.startswith("modelyard-"):
        shutil.rmtree(before["path"], ignore_errors=True)
    here = Path.cwd() / "s"
    shutil.rmtree(here, ignore_errors=True)
    if len(os.fsencode(here)) <= LONGEST:
        here.mkdir(mode=0o700)
        return here
    above = os.environ.get("TMPDIR", "")
    fits = os.path.isabs(above) and os.path.isdir(above) and len(os.fsencode(above)) <= SHORT
    elsewhere = tempfile.mkdtemp(prefix="modelyard-", dir=above if fits else "/tmp")
    write_json("sockets.json", {"path": elsewhere})
    return Path(elsewhere)


async def live(public: dict[str, socket.socket], control: socket.socket, sockets: Path) -> None:
    supervisor = Supervisor(sockets, {kind: sock.getsockname()[1] for kind, sock in public.items()})
    door = Control(supervisor)
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, door.stop)
    await supervisor.start(public)
    server = await asyncio.start_unix_server(door.serve, sock=control, limit=LINE)
    thinking = loop.create_task(supervisor.run())
    ended = loop.create_task(door.ended.wait())
    await asyncio.wait({thinking, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done() and not supervisor.stopping:
        await asyncio.shield(door.stop())  # its mind failed: end everything, so that a fresh one is started
    await ended
    server.close()
    if thinking.done() and (exc := thinking.exception()) is not None:
        raise exc


if __name__ == "__main__":
    main()
