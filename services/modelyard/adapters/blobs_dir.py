"""BlobStore and CaptureGrants in a folder.

Standard library only (beside the port and the error tree): this file is also baked into scoring images, where the
shipper uses ``open_grant``. A blob is a file at ``<root>/<key>``; ``<root>/.tmp`` holds what is being written and
``<root>/.grants`` what was lent. Several processes may share the folder. Because a blob is a file, ``a`` and ``a/b``
cannot both be keys here (Invalid). The filesystem must know hard links.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import stat as modes
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from ..core.errors import Denied, Invalid, NotFound, Unavailable
from ..core.layout import segments_prefix
from ..ports.blobs import Blob, BlobStore, CaptureGrants
from .folder import Draft, alone, in_thread, make_folder, ours, sweep

CHUNK = 1 << 20
TEMP, GRANTS = ".tmp", ".grants"
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
R = TypeVar("R")


def check_key(key: str) -> None:
    """Raises Invalid for anything but a relative path of plain parts outside our own folders."""
    parts = key.split("/")
    if not key or len(key.encode()) > 1024 or CONTROL.search(key) or parts[0] in (TEMP, GRANTS) \
            or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        raise Invalid(f"'{key[:200]}' is not a blob key: write parts with '/' between, none of them empty, '.' or '..'")


class DirBlobs(BlobStore):
    """Blobs as files below ``root``, which is made when it is first used."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self._ready = False

    def _open(self) -> None:
        if not self._ready:
            make_folder(self.root / TEMP)
            sweep(self.root / TEMP)
            self._ready = True

    async def check(self) -> None:
        def probe() -> None:
            self._open()
            Draft(self.root / TEMP).discard()

        with ours(f"files in {self.root}"):
            await in_thread(probe)

    async def close(self) -> None:
        pass

    async def put(self, key: str, chunks: AsyncIterable[bytes], if_absent: bool = False) -> bool:
        check_key(key)
        if if_absent and await self.stat(key) is not None:
            return False
        drafts: list[Draft] = []

        def write(waiting: Sequence[bytes]) -> None:
            if not drafts:
                self._open()
                drafts.append(Draft(self.root / TEMP))
            drafts[0].write(waiting)

        def finish(waiting: Sequence[bytes]) -> bool:
            write(waiting)
            return drafts[0].publish(self.root / key, if_absent)

        async def work(fn: Callable[[Sequence[bytes]], R], waiting: Sequence[bytes]) -> R:
            with ours(f"'{key}'"):
                return await in_thread(fn, waiting)

        try:
            waiting: list[bytes] = []
            size = 0
            async for chunk in chunks:
                waiting.append(chunk)
                size += len(chunk)
                if size >= CHUNK:
                    await work(write, waiting)
                    waiting, size = [], 0
            return await work(finish, waiting)
        finally:
            if drafts:
                await in_thread(drafts[0].discard)

    async def get(self, key: str, start: int = 0) -> AsyncIterator[bytes]:
        check_key(key)

        def begin() -> tuple[BinaryIO, bytes]:
            file = open(self.root / key, "rb", buffering=0)  # noqa: SIM115 - closed below
            try:
                file.seek(start)
                return file, file.read(CHUNK)
            except BaseException:
                file.close()
                raise

        with ours(f"'{key}'"):
            try:
                file, chunk = await in_thread(begin)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
                raise NotFound(f"there is no blob '{key}'", key=key) from exc
        try:
            while chunk:
                yield chunk
                with ours(f"'{key}'"):
                    chunk = await in_thread(file.read, CHUNK)
        finally:
            file.close()

    async def stat(self, key: str) -> Blob | None:
        check_key(key)
        try:
            with ours(f"'{key}'"):
                found = await in_thread(os.stat, self.root / key)
        except (Invalid, Unavailable) as exc:
            if isinstance(exc.__cause__, (FileNotFoundError, NotADirectoryError)):
                return None
            raise
        return as_blob(key, found) if modes.S_ISREG(found.st_mode) else None

    async def list(self, prefix: str = "", after: str = "") -> AsyncIterator[Blob]:
        if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")) or CONTROL.search(prefix):
            raise Invalid(f"'{prefix}' is not the beginning of a blob key")
        base = prefix.rpartition("/")[0]
        found = walk(self.root / base, f"{base}/" if base else "", prefix, after)
        while True:
            with ours(f"a list of '{prefix}'"):
                page = await in_thread(lambda: [*itertools.islice(found, 500)])
            for blob in page:
                yield blob
            if len(page) < 500:
                return

    async def delete(self, key: str) -> None:
        check_key(key)

        def remove() -> None:
            path = self.root / key
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
            for folder in path.parents:
                if folder == self.root:
                    return
                try:
                    folder.rmdir()   # an empty folder is no blob; a writer that needs it makes it again
                except FileNotFoundError:
                    continue
                except OSError:
                    return

        with ours(f"the removal of '{key}'"):
            await in_thread(remove)


def as_blob(key: str, found: os.stat_result) -> Blob:
    return Blob(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def walk(folder: Path, base: str, prefix: str, after: str) -> Iterator[Blob]:
    """Keys in the order of their text: a folder sorts as its name with the '/' that all its keys have."""
    try:
        with os.scandir(folder) as found:
            names = sorted(e.name + "/" if e.is_dir(follow_symlinks=False) else e.name for e in found)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        key = base + name
        if not name.endswith("/"):
            if key.startswith(prefix) and key > after:
                with suppress(FileNotFoundError):
                    yield as_blob(key, os.stat(folder / name, follow_symlinks=False))
        elif key not in (f"{TEMP}/", f"{GRANTS}/") and (key.startswith(prefix) or prefix.startswith(key)) \
                and (key > after or after.startswith(key)):
            yield from walk(folder / name, key, prefix, after)


class DirGrants(CaptureGrants):
    """What was lent lies in ``.grants/<workspace>/<deployment>``: the URL's secret, its end and its folder.

    Renewing keeps the URL, so that a shipper need not be told.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    async def check(self) -> None:
        await DirBlobs(self.root).check()

    async def close(self) -> None:
        pass

    async def lend(self, workspace: str, deployment: str, seconds: int) -> str:
        check_key(f"{workspace}/{deployment}")
        prefix = segments_prefix(workspace, deployment)
        with ours(f"a grant for '{deployment}'"):
            secret = await in_thread(self._write, grant_path(self.root, workspace, deployment), prefix, seconds)
        about = urlencode({"workspace": workspace, "deployment": deployment, "secret": secret})
        return f"file://{quote(str(self.root))}?{about}"

    def _write(self, path: Path, prefix: str, seconds: int) -> str:
        make_folder(self.root / TEMP)
        with alone(self.root / GRANTS):
            old = read_grant(path) or {}
            grant = {"secret": old.get("secret") or secrets.token_hex(16), "prefix": prefix,
                     "until": max(old.get("until", 0.0), time.time() + seconds)}
            draft = Draft(self.root / TEMP)
            try:
                draft.write([json.dumps(grant).encode()])
                draft.publish(path, if_absent=False)
            finally:
                draft.discard()
        return str(grant["secret"])

    async def revoke(self, workspace: str, deployment: str) -> None:
        check_key(f"{workspace}/{deployment}")

        def remove() -> None:
            with alone(self.root / GRANTS):
                grant_path(self.root, workspace, deployment).unlink(missing_ok=True)

        with ours(f"the end of the grant for '{deployment}'"):
            await in_thread(remove)


def grant_path(root: Path, workspace: str, deployment: str) -> Path:
    return root / GRANTS / workspace / deployment


def read_grant(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None


class DirGrant:
    """The shipper's end of a lent URL: it can add new objects, and nothing else."""

    def __init__(self, root: Path, workspace: str, deployment: str, secret: str) -> None:
        self.path, self.secret = grant_path(root, workspace, deployment), secret
        self.blobs = DirBlobs(root)

    async def put(self, name: str, data: bytes) -> bool:
        """Stores ``data`` under a new name; False when the name is taken (what is there stays).

        Raises Denied when the grant lapsed or was revoked, Invalid for a name with '/', Unavailable otherwise.
        """
        if "/" in name or name in ("", ".", ".."):
            raise Invalid(f"'{name}' is not the name of a new object: '/', '.' and '..' have no place in it")
        with ours("the grant"):
            grant = await in_thread(read_grant, self.path)
        if grant is None or not secrets.compare_digest(str(grant["secret"]), self.secret):
            raise Denied("this grant was revoked")
        if grant["until"] <= time.time():
            raise Denied("this grant has lapsed; its lender may renew it")

        async def once() -> AsyncIterator[bytes]:
            yield data

        return await self.blobs.put(f"{str(grant['prefix']).rstrip('/')}/{name}", once(), if_absent=True)


def open_grant(url: str) -> DirGrant:
    """The grant behind a URL that ``DirGrants.lend`` gave. Raises Invalid for anything else."""
    parts = urlsplit(url)
    about = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    if parts.scheme != "file" or not {"workspace", "deployment", "secret"} <= about.keys():
        raise Invalid("a grant of a blob folder is file:///FOLDER?workspace=…&deployment=…&secret=…")
    check_key(f"{about['workspace']}/{about['deployment']}")
    return DirGrant(Path(unquote(parts.path)), about["workspace"], about["deployment"], about["secret"])
