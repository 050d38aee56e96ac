"""Small, valid wheels of the tests' own, and a package index of them: nothing real is asked for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import sys
import threading
import zipfile
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from packaging.requirements import Requirement

from modelyard.image_builder.resolve import server_requirements

NATIVE = ("grpcio", "numpy")


def wheel(folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any", *,
          files: Mapping[str, bytes] | None = None, requires: Sequence[str] = ()) -> Path:
    """A wheel of ``NAME.py``, or of the files given; the same bytes each time."""
    info, pure = f"{name}-{version}.dist-info", tag.endswith("-any")
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    inside = {**(files or {f"{name}.py": b"VALUE = 1\n"}),
              f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}".encode(),
              f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: {str(pure).lower()}\n"
                               f"Tag: {tag}\n".encode()}
    record = "".join(f"{path},sha256={_b64(data)},{len(data)}\n" for path, data in inside.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, data in {**inside, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(zipfile.ZipInfo(inner, (1980, 1, 1, 0, 0, 0)), data)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def locked(*wheels: Path) -> str:
    """A lock of exactly these."""
    pins: dict[str, list[str]] = {}
    for path in wheels:
        name, version = path.name.split("-")[:2]
        pins.setdefault(f"{name}=={version}", []).append(f"    --hash=sha256:{sha256(path)}")
    return "".join(f"{pin} \\\n" + " \\\n".join(hashes) + "\n" for pin, hashes in pins.items())


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


class Index:
    """A package index (PEP 503) of a folder of wheels, on loopback; ``user:password`` is wanted where it is given.
    ``asked`` is what it was asked for, ``with Index(folder) as index``."""

    def __init__(self, folder: Path, login: str = "") -> None:
        self.folder, self.asked, self.refused = folder, list[str](), 0
        self._held = "\n", threading.Event(), threading.Event()
        wanted = "Basic " + base64.b64encode(login.encode()).decode() if login else ""
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if wanted and self.headers.get("Authorization") != wanted:
                    index.refused += 1
                    return self.answer(401, b"", ("WWW-Authenticate", 'Basic realm="index"'))
                index.asked.append(self.path)
                index.wait(self.path)
                status, body = index.find(self.path)
                self.answer(status, body, ("Content-Type", "text/html" if self.path.endswith("/") else "binary/x"))

            def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
                self.send_response(status)
                for name, value in (*headers, ("Content-Length", str(len(body)))):
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(OSError):  # whoever asked is dead
                        self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def hold(self, fits: str) -> threading.Event:
        """Calls whose path has this in it wait until ``let_go``; the event says that one is there."""
        self._held = fits, threading.Event(), threading.Event()
        return self._held[1]

    def let_go(self) -> None:
        self._held[2].set()
        self._held = "\n", threading.Event(), threading.Event()

    def wait(self, path: str) -> None:
        fits, there, over = self._held
        if fits in path:
            there.set()
            over.wait(60)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/simple/"

    def find(self, path: str) -> tuple[int, bytes]:
        last = path.rstrip("/").rpartition("/")[2]
        if not path.endswith("/"):
            return 200, (self.folder / last).read_bytes()
        found = [p for p in sorted(self.folder.glob("*.whl")) if p.name.partition("-")[0].replace("_", "-") == last]
        links = "".join(f'<a href="/files/{p.name}#sha256={sha256(p)}">{html.escape(p.name)}</a>' for p in found)
        return (200, f"<!DOCTYPE html><html><body>{links}</body></html>".encode()) if found else (404, b"")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def house(folder: Path, machines: Sequence[str] = ("x86_64", "aarch64"), minor: int = sys.version_info[1]) -> Path:
    """All that the scoring server needs, as wheels of a few bytes; grpcio and numpy for each machine its own."""
    for line in server_requirements():
        need = Requirement(line)
        name = need.name.replace("-", "_")
        version = next((s.version for s in need.specifier if s.operator in (">=", "==")), "1.0")
        if name not in NATIVE:
            wheel(folder, name, version)
        for machine in machines if name in NATIVE else ():
            wheel(folder, name, version, f"cp3{minor}-cp3{minor}-manylinux_2_28_{machine}",
                  files={f"{name}/__init__.py": b"", f"{name}/native.so": machine.encode()})
    return folder
