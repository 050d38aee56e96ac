"""ImageStore ``oci://HOST[:PORT][/PREFIX]``: an OCI distribution registry.

Only what is missing goes up: a blob that the repository has is left alone, one that another repository of ours has is
mounted from there, the rest is sent in parts and resumed after a cut. Credentials are Docker's (``docker login``).
Blobs are taken away by the registry's own garbage collection, never by us: it alone knows what nobody needs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Self
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from ..core.errors import Denied, Invalid, ModelyardError, NotFound, Unavailable
from ..kernel.proxies import OFF, checked, loopback
from ..ports.images import ImageStore
from .images_names import MANIFESTS, OCI_CONFIG, OCI_MANIFEST, hex_of, is_manifest, parts, repo_of, tag_of
from .images_registry_errors_http import BROKEN, pause
from .images_registry_http import TRIES, Door
from .images_registry_known import Known
from .images_registry_tags import MOVED, VERSION, Tags
from .images_registry_upload import send

CHUNK = 1 << 20
SIDE_BY_SIDE = 8
TORN = 3
"""So often a manifest is read that is not what its digest says: a registry on files writes them in place."""
CUT = (*BROKEN, Unavailable)


class RegistryImages(ImageStore):
    """One registry, below one prefix. Any number of processes may use it at once."""

    def __init__(self, door: Door, prefix: str) -> None:
        self._door = door
        self._prefix = f"{prefix}/" if prefix else ""
        self._known = Known(self._prefix, self._json)
        self._tags = Tags(door)
        self._turn: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    async def open(cls, url: str, tls: str = "", timeout_s: float = 30.0, proxy: str = "") -> Self:
        """``tls``: ``on`` or ``off``; by itself it is off on loopback and on elsewhere. ``timeout_s`` is how long the
        registry may be silent. ``proxy``: the URL of one, or ``off``; by itself what HTTPS_PROXY, HTTP_PROXY and
        NO_PROXY say, and none on loopback. Opens no connection. Invalid for a URL that is none of a registry."""
        given = urlsplit(url)
        host, prefix = given.netloc, given.path.strip("/")
        if "@" in host:
            raise Invalid("credentials in a registry's URL are refused; run docker login "
                          f"{host.rpartition('@')[2]} as the user that Modelyard runs as", field="images")
        if tls not in ("", "on", "off"):
            raise Invalid(f"tls is on or off, not '{tls}'", field="images")
        if proxy not in ("", OFF) and checked(proxy).user:
            raise Invalid("credentials in proxy= are refused; HTTPS_PROXY and HTTP_PROXY may hold them", field="images")
        if prefix:
            repo_of(prefix)
        return cls(Door(host, tls != "off" if tls else not loopback(host), timeout_s, proxy), prefix)

    async def check(self) -> None:
        """Whether it is a registry and takes our credentials."""
        try:
            await self._door.ask("GET", "/v2/", about="images", tries=1)
        except (NotFound, Invalid) as exc:
            raise Invalid(f"there is no OCI registry at {self._door.host}: {exc.message}; check images=",
                          field="images") from exc

    async def close(self) -> None:
        await self._known.close()
        await self._door.close()

    def reference(self, repo: str, digest: str) -> str:
        """How other programs call this image: for ``docker pull``."""
        return f"{self._door.host}/{self._name(repo)}@{digest}"

    # -- blobs --------------------------------------------------------------------------------------------------------

    async def put_blob(self, repo: str, digest: str, chunks: AsyncIterable[bytes]) -> bool:
        """Left alone, mounted, or sent. An upload that fails leaves nothing."""
        name = self._name(repo)
        hex_of(digest)
        if await self._size(name, digest) is not None:
            self._known.note(name, digest)
            return False
        begun = None
        elsewhere = await self._known.where(digest)
        if elsewhere not in (None, name):
            mounted = await self._door.ask(  # 401, 403: we may not read there, and can still send it
                "POST", f"/v2/{name}/blobs/uploads/?mount={digest}&from={elsewhere}", ok=(201, 202, 401, 403),
                repo=name, about=f"blob {digest[:19]} of {name}", headers={"Content-Length": "0"})
            if mounted.status == 201:
                self._known.note(name, digest)
                return False
            self._known.drop(digest)
            if mounted.status == 202:
                begun = self._door.location(mounted.headers, mounted.url)
        await send(self._door, name, digest, chunks, begun)
        self._known.note(name, digest)
        return True

    async def get_blob(self, repo: str, digest: str, start: int = 0) -> AsyncIterator[bytes]:
        """Goes on where it was cut off; Unavailable when that fails several times without a byte between."""
        name = self._name(repo)
        hex_of(digest)
        if start < 0:
            raise Invalid("a blob is read from byte 0 or later")
        seen = hashlib.sha256() if start == 0 else None
        place, attempt, ended = start, 1, False
        while not ended:
            before = place
            try:
                async for chunk in self._read(name, digest, place):
                    place += len(chunk)
                    if seen is not None:
                        seen.update(chunk)
                    yield chunk
                ended = True
            except CUT as exc:
                attempt = attempt + 1 if place == before else 1
                if attempt > TRIES:
                    raise (exc if isinstance(exc, Unavailable) else
                           self._door.broken(f"blob {digest[:19]} of {name}", exc)) from exc
                await pause(attempt, exc)
        if seen is not None and f"sha256:{seen.hexdigest()}" != digest:
            raise Invalid(f"blob {digest} is damaged in the registry {self._door.host}: its bytes hash to "
                          f"sha256:{seen.hexdigest()}")

    async def _read(self, name: str, digest: str, start: int) -> AsyncIterator[bytes]:
        """One try, from a byte on. A registry that knows no ranges sends what we have as well."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        async with self._door.opened("GET", f"/v2/{name}/blobs/{digest}", repo=name, headers=headers) as answer:
            if answer.status == 416:
                return
            if answer.status not in (200, 206):
                raise self._door.error(f"blob {digest} of {name}", answer.status, answer.headers,
                                       await answer.content.read(CHUNK))
            skip = start if answer.status == 200 else 0
            async for chunk in answer.content.iter_chunked(CHUNK):
                if skip < len(chunk):
                    yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    async def _size(self, name: str, digest: str, kind: str = "blobs") -> int | None:
        headers = {"Accept": MANIFESTS} if kind == "manifests" else {}  # a dozen blobs are asked for of every image
        found = await self._door.ask("HEAD", f"/v2/{name}/{kind}/{digest}", about=f"{kind} {digest[:19]} of {name}",
                                     ok=(200, 404), repo=name, headers=headers)
        return int(found.headers.get("Content-Length", -1)) if found.status == 200 else None

    # -- manifests and tags -------------------------------------------------------------------------------------------

    async def put_manifest(self, repo: str, tag: str, manifest: bytes, media_type: str) -> str:
        """The tag moves in one step; the manifest before it goes when no other tag has it."""
        name, tag = self._name(repo), tag_of(tag)
        needs = parts(manifest)
        await self._all_there(name, needs)
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        async with self._turn.setdefault(name, asyncio.Lock()):
            before = await self._tags.digest(name, tag)
            if moves := before not in (None, digest):
                await self._mark(name, tag)
            await self._put(name, tag, manifest, media_type)
            self._tags.note(name, tag, digest)
            if moves:
                await self._mark(name, tag)
                await self._delete(name, str(before), had=tag)
        self._known.note(name, *(part["digest"] for part in needs if not is_manifest(part)))
        return digest

    async def get_manifest(self, repo: str, reference: str) -> tuple[bytes, str] | None:
        """By tag or by digest, checked against the digest."""
        name = self._name(repo)
        by_digest = reference.startswith("sha256:")
        _ = hex_of(reference) if by_digest else tag_of(reference)
        for attempt in range(1, TORN + 1):
            if (found := await self._manifest(name, reference)) is None:
                return None
            body, kind, told = found
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            wanted = reference if by_digest else told
            if not wanted.startswith("sha256:") or wanted == digest:
                return body, kind
            if attempt < TORN:
                await pause(attempt)
        raise Invalid(f"manifest {reference} of {name} is damaged in the registry {self._door.host}: it hashes to "
                      f"{digest}, not to {wanted}")

    async def _manifest(self, name: str, reference: str) -> tuple[bytes, str, str] | None:
        """Its bytes and type, and the digest that the registry tells."""
        found = await self._door.ask("GET", f"/v2/{name}/manifests/{reference}", ok=(200, 404), repo=name,
                                     about=f"manifest {reference} of {name}", headers={"Accept": MANIFESTS})
        if found.status == 404:
            return None
        kind = found.headers.get("Content-Type", OCI_MANIFEST).partition(";")[0]
        return found.body, kind, found.headers.get("Docker-Content-Digest", "")

    async def remove(self, repo: str, tag: str) -> None:
        """The tag, and its manifest when no other tag has it. Registries that cannot take a tag away alone are led by
        a manifest of our own that the tag is moved to first."""
        name, tag = self._name(repo), tag_of(tag)
        async with self._turn.setdefault(name, asyncio.Lock()):
            digest = await self._tags.digest(name, tag)
            if digest is None:
                return
            if not await self._tags.others(name, digest, tag):
                return await self._delete(name, digest)
            done = await self._door.ask("DELETE", f"/v2/{name}/manifests/{tag}", about=f"tag {tag} of {name}",
                                        ok=(200, 202, 400, 404, 405), repo=name)
            if done.status in (400, 405):
                await self._delete(name, await self._put_aside(name, tag))

    async def _put_aside(self, name: str, tag: str) -> str:
        """Moves the tag to a manifest that nothing else is like; its digest."""
        return await self._put_note(name, tag, "io.modelyard.removed", f"{name}:{tag}")

    async def _mark(self, name: str, tag: str) -> None:
        """A tag that others remember moves: says so to them."""
        if VERSION.match(tag):
            before = await self._tags.digest(name, MOVED)
            await self._put_note(name, MOVED, "io.modelyard.moved", f"{tag} {secrets.token_hex(8)}")
            if before is not None:
                await self._delete(name, before, had=MOVED)

    async def _put_note(self, name: str, tag: str, what: str, told: str) -> str:
        config = b"{}"
        digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        if await self._size(name, digest) is None:
            await send(self._door, name, digest, _once(config))
        body = json.dumps({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [],
            "config": {"mediaType": OCI_CONFIG, "digest": digest, "size": len(config)},
            "annotations": {what: told}}).encode()
        await self._put(name, tag, body, OCI_MANIFEST)
        return f"sha256:{hashlib.sha256(body).hexdigest()}"

    async def _put(self, name: str, tag: str, manifest: bytes, media_type: str) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                await self._door.ask("PUT", f"/v2/{name}/manifests/{tag}", about=f"manifest {tag} of {name}", repo=name,
                                     ok=(201, 200), headers={"Content-Type": media_type}, data=manifest)
                return
            except (Invalid, NotFound) as exc:
                if "DIGEST_INVALID" not in exc.message or attempt == TRIES:
                    raise Invalid(exc.message, code="blob-missing" if "BLOB_UNKNOWN" in exc.message else None) from exc
                await pause(attempt)  # we gave no digest: another process puts the same manifest at this moment

    async def _delete(self, name: str, digest: str, had: str = "") -> None:
        """A manifest, and with it every tag that has it; not what others than ``had`` have, which moved away from it. A
        registry that deletes nothing keeps that one untagged."""
        if had and had != MOVED and await self._tags.others(name, digest, had):
            return
        done = await self._door.ask("DELETE", f"/v2/{name}/manifests/{digest}", ok=(200, 202, 400, 404, 405), repo=name,
                                    about=f"manifest {digest[:19]} of {name}")
        if done.status in (400, 405) and not had:
            raise Denied(f"the registry {self._door.host} deletes nothing: turn its deletion on (CNCF Distribution: "
                         "storage.delete.enabled, or REGISTRY_STORAGE_DELETE_ENABLED=true)")

    async def _all_there(self, name: str, needs: list[dict[str, Any]]) -> None:
        limit = asyncio.Semaphore(SIDE_BY_SIDE)

        async def one(part: dict[str, Any]) -> None:
            async with limit:
                size = await self._size(name, part["digest"], "manifests" if is_manifest(part) else "blobs")
            if size is None or size not in (part["size"], -1):
                raise Invalid(f"the manifest needs blob {part['digest']} of {part['size']} bytes; put it first",
                              code="blob-missing")

        for outcome in await asyncio.gather(*(one(part) for part in needs), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def _name(self, repo: str) -> str:
        return repo_of(f"{self._prefix}{repo_of(repo)}")

    async def _json(self, repo: str, path: str) -> dict[str, object] | None:
        try:
            found = await self._door.ask("GET", path, about="images", repo=repo, headers={"Accept": OCI_MANIFEST},
                                         tries=1)
            body = json.loads(found.body)
        except (ModelyardError, ValueError):
            return None
        return body if isinstance(body, dict) else None


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
