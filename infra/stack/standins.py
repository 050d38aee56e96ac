"""Images of the same names as public ones, made of the servers that this stack installs: for where none can be pulled.

    python -m infra.stack standins                        # into the stack's own engine, all of them
    python -m infra.stack standins mongo:6.0 registry:2

They behave as the public ones do for what this project uses of them, and each carries the label
``dev.modelyard.stand-in``. A public one of the same name that an engine has already is left as it is.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import platform
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import debian
from .docker import Docker
from .server import CACHE, StackError
from .standins_layers import MADE, Layer, servers, small, users
from .standins_recipes import RECIPES, Recipe

LABEL = "dev.modelyard.stand-in"
ALL: tuple[str, ...] = tuple(RECIPES)
"""The names of the images, as they are pulled."""
CREATED = "2026-01-01T00:00:00Z"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PIECE = 1 << 20
LOAD_S = 600.0


def missing(names: Sequence[str] = ALL) -> str:
    """Why they cannot be made on this machine; "" when they can."""
    made = {MADE[part] for name in names for part in RECIPES[name].parts if part in MADE}
    return debian.missing() or next(filter(None, (server.missing() for server in made)), "")


def build(docker: Docker, names: Sequence[str] = ALL, say: Callable[[str], None] = lambda line: None) -> None:
    """Puts them into an engine that runs: those that it lacks, or has of another content. Made in about a minute at
    first, loaded in seconds by a fresh engine, and a look when it has them. StackError when one cannot be made."""
    if unknown := [name for name in names if name not in RECIPES]:
        raise StackError(f"no stand-in is called {', '.join(unknown)}; there are: {', '.join(ALL)}")
    if reason := missing(names):
        raise StackError(f"stand-ins: {reason}")
    wanted: dict[str, tuple[bytes, list[Layer]]] = {}
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".standins-") as folder:
        for n, name in enumerate(names):
            here = inspect(docker, name)
            if here and LABEL not in (here["Config"]["Labels"] or {}):
                say(f"{name}: the engine has the public one")
                continue
            say(f"{name}: made of {', '.join(RECIPES[name].parts)}")
            config, layers = _image(name, RECIPES[name], Path(folder) / f"{n}.tar.gz")
            if here.get("Id") == f"sha256:{hashlib.sha256(config).hexdigest()}":
                say(f"{name}: the engine has it")
            else:
                wanted[name] = config, layers
        if wanted:
            say(f"loading {', '.join(wanted)}")
            _load(docker, _archive(wanted))


def inspect(docker: Docker, name: str) -> dict[str, Any]:
    """What an engine says of an image; nothing when it has none of this name."""
    status, told = _ask(docker, "GET", f"/images/{quote(name)}/json")
    if status == 404:
        return {}
    if status != 200:
        raise StackError(f"stand-ins: the engine at {docker.socket} answered {status}: {told[:200]!r}")
    found: dict[str, Any] = json.loads(told)
    return found


def _image(name: str, recipe: Recipe, path: Path) -> tuple[bytes, list[Layer]]:
    """(its configuration, its layers); its own layer is written to ``path``."""
    layers = [*(servers(part) for part in ("debian", "tools", *recipe.parts)), small(_own(recipe), path)]
    about = f"stands in for {name}: Debian with {', '.join(recipe.parts)}, for tests without a registry of images"
    config = {"Env": [PATH, "LANG=C.UTF-8"], **recipe.config, "Labels": {LABEL: about}}
    return json.dumps({
        "architecture": debian.MACHINES.get(platform.machine(), platform.machine()), "os": "linux", "created": CREATED,
        "config": config, "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": CREATED, "created_by": f"python -m infra.stack standins {name}"} for _ in layers],
    }, sort_keys=True).encode(), layers


def _own(recipe: Recipe) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The layer that is of this image alone."""

    def member(path: str, content: bytes = b"", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(path)
        info.size, info.mtime, info.mode = len(content), debian.EPOCH, 0o755 if content[:2] == b"#!" else 0o644
        for name, value in more.items():
            setattr(info, name, value)
        return info, content

    passwd, group = users()
    for user, uid in recipe.users.items():
        passwd += f"{user}:x:{uid}:{uid}::/home/{user}:/bin/bash\n"
        group += f"{user}:x:{uid}:\n"
    owned = [member(path, type=tarfile.DIRTYPE, mode=0o775, uid=owner, gid=owner)
             for path, owner in recipe.folders.items()]
    files = {"etc/passwd": passwd, "etc/group": group, **recipe.files}
    hidden = [str(Path(path).with_name(f".wh.{Path(path).name}")) for path in recipe.gone]
    return [*owned, *(member(path, text.encode()) for path, text in files.items()), *map(member, hidden),
            *(member(path, type=tarfile.SYMTYPE, linkname=to) for path, to in recipe.links.items())]


# -- the engine -------------------------------------------------------------------------------------------------------


def _archive(images: dict[str, tuple[bytes, list[Layer]]]) -> Iterator[bytes]:
    """The tar that ``docker load`` takes: layers that images share are in it once."""
    index, sent = [], set()
    for name, (config, layers) in images.items():
        files = [layer.diff_id.removeprefix("sha256:") + ".tar" for layer in layers]
        about = hashlib.sha256(config).hexdigest() + ".json"
        index.append({"Config": about, "RepoTags": [name], "Layers": files})
        yield from _member(about, len(config), iter([config]))
        for file, layer in zip(files, layers, strict=True):
            if file not in sent:
                sent.add(file)
                yield from _member(file, layer.path.stat().st_size, _pieces(layer.path))
    manifest = json.dumps(index).encode()
    yield from _member("manifest.json", len(manifest), iter([manifest]))
    yield b"\0" * 2 * tarfile.BLOCKSIZE


def _member(name: str, size: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size = size
    yield info.tobuf(tarfile.GNU_FORMAT)
    yield from pieces
    yield b"\0" * (-size % tarfile.BLOCKSIZE)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _load(docker: Docker, archive: Iterator[bytes]) -> None:
    status, told = _ask(docker, "POST", "/images/load?quiet=1", archive)
    failed = [line for line in told.splitlines() if b'"error"' in line]  # it is told after the status
    if status != 200 or failed:
        raise StackError(f"stand-ins: the engine did not load them: {status} {b' '.join(failed or [told])[-500:]!r}")


class _Socket(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("docker", timeout=LOAD_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def _ask(docker: Docker, verb: str, path: str, body: Iterator[bytes] | None = None) -> tuple[int, bytes]:
    wire = _Socket(docker.socket)
    try:
        if body is None:
            wire.request(verb, path)
        else:
            pieces = (piece for piece in body if piece)  # an empty one would end a chunked body
            wire.request(verb, path, pieces, {"Content-Type": "application/x-tar", "Transfer-Encoding": "chunked"},
                         encode_chunked=True)
        answer = wire.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as exc:
        raise StackError(f"stand-ins: no engine answers at {docker.socket}: {exc!r}; "
                         "start it: python -m infra.stack start docker") from exc
    finally:
        wire.close()
