"""Whether an image is what is said of it: checked here, by a key that the caller trusts, not by the server."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.attest import PublicKey, opened, public_keys, subject
from ..core.errors import Invalid, NotFound
from .http import Http, path

BASE = "org.opencontainers.image.base.digest"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``message`` is a line for people."""

    what: str
    ok: bool
    message: str


@dataclass(frozen=True)
class Verification:
    """All findings about an image. ``key`` is the id of the key that signed it, None when no trusted one did."""

    image: str
    digest: str
    key: str | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return all(finding.ok for finding in self.findings)

    @property
    def document(self) -> dict[str, Any]:
        """For printing."""
        return {"image": self.image, "digest": self.digest, "verified": self.ok, "key": self.key,
                "findings": [{"what": f.what, "ok": f.ok, "message": f.message} for f in self.findings]}


def read_keys(key: str | Path | None) -> list[PublicKey] | None:
    """The public keys of a file, or of PEM text. Invalid. Blocking."""
    if key is None:
        return None
    if isinstance(key, str) and "-----BEGIN" in key:
        return public_keys(key.encode())
    try:
        return public_keys(Path(key).read_bytes(), f"'{key}'")
    except OSError as exc:
        raise Invalid(f"the key '{key}' cannot be read: {exc.strerror or exc}", field="key") from exc


async def verify(http: Http, reference: str, key: str | Path | None) -> Verification:
    """Looks at everything; what is wrong is a finding, not an error. Raises NotFound, Invalid for no key, Unavailable,
    and Conflict for an image that is not ready."""
    keys = await asyncio.to_thread(read_keys, key)
    document = await http.json("GET", path("images", reference))
    whole = _Image(http, document["id"], document)
    manifest = (await http.send("GET", path("images", whole.id, "manifest"))).body
    findings = [_same("manifest", _digest(manifest), str(document["digest"]), "the manifest", "the image")]
    theirs = keys is None
    trusted = keys or public_keys((await http.json("GET", path("signing-key")))["pem"].encode(), "the yard's key")
    try:
        envelope = await whole.kept("provenance")
        if envelope is None:
            raise Invalid("the image has no provenance; it was built by a version that signed nothing")
        statement = opened(_json(envelope), trusted)
    except Invalid as exc:
        findings.append(Finding("signature", False, exc.message))
        return Verification(whole.id, str(document["digest"]), None, tuple(findings))
    signer = _signer(_json(envelope), trusted)
    note = ", the yard's own; give --key to check by one that you keep yourself" if theirs else ""
    findings.append(Finding("signature", True, f"the provenance is signed by {signer[:16]}{note}"))
    findings.append(_subject(statement, _digest(manifest)))
    findings += [finding async for finding in whole.materials(statement, _json(manifest))]
    return Verification(whole.id, str(document["digest"]), signer, tuple(findings))


@dataclass(frozen=True)
class _Image:
    """What the yard says now."""

    http: Http
    id: str
    document: dict[str, Any]

    async def kept(self, what: str) -> bytes | None:
        try:
            return (await self.http.send("GET", path("images", self.id, what))).body
        except NotFound:
            return None

    async def materials(self, statement: dict[str, Any], manifest: Any) -> AsyncIterator[Finding]:
        """Models, lock, base and bill of materials, against the signed statement."""
        try:
            predicate = statement["predicate"]
            used = [(str(m["name"]), str(m.get("uri", "")), "sha256:" + str(m.get("digest", {}).get("sha256")))
                    for m in predicate["buildDefinition"]["resolvedDependencies"]]
            told = {str(b["name"]): f"sha256:{b['digest']['sha256']}" for b in predicate["runDetails"]["byproducts"]}
        except (KeyError, TypeError, AttributeError):
            yield Finding("materials", False, "the signed statement does not say what the image was made of")
            return
        models = {uri.removeprefix("urn:modelyard:model:"): digest for name, uri, digest in used if name == "model"}
        for id in dict.fromkeys([*self.document.get("models", ()), *models]):
            yield await self.model(id, models.get(id))
        of = {name: digest for name, _, digest in used}
        lock = await self.kept("lock")
        yield _same("lock", _digest(lock), of.get("lock"), "the lock", "the statement")
        if self.document.get("score"):
            yield _same("score", self.document["score"], of.get("score"), "the scoring file", "the statement")
        base = (manifest.get("annotations") or {}).get(BASE)
        if base or "base" in of:
            yield _same("base", base, of.get("base"), "the base", "the statement")
        yield _same("sbom", _digest(await self.kept("sbom")), told.get("sbom"), "the bill of materials",
                    "the statement")

    async def model(self, id: str, told: str | None) -> Finding:
        try:
            found = (await self.http.json("GET", path("models", id)))["artifact"]
        except NotFound:
            return Finding("model", False, f"model {id} is not in the registry")
        if id not in self.document.get("models", ()):
            return Finding("model", False, f"the statement names model {id}, the image does not")
        return _same("model", found, told, f"model {id}", "the statement")


def _subject(statement: dict[str, Any], digest: str) -> Finding:
    try:
        return _same("subject", digest, subject(statement), "the image", "the statement")
    except Invalid as exc:
        return Finding("subject", False, exc.message)


def _same(what: str, found: str | None, wanted: str | None, name: str, whose: str) -> Finding:
    if found is not None and found == wanted:
        return Finding(what, True, f"{name} is {found[:19]}, as {whose} says")
    here = f"is {found[:19]}" if found else "is not there"
    return Finding(what, False, f"{name} {here}; {whose} says {wanted[:19] if wanted else 'nothing of it'}")


def _digest(body: bytes | None) -> str:
    return "" if body is None else f"sha256:{hashlib.sha256(body).hexdigest()}"


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as exc:
        raise Invalid("what the server gave is not JSON") from exc


def _signer(envelope: Any, keys: Sequence[PublicKey]) -> str:
    """Which of several keys it was."""
    for key in keys:
        try:
            opened(envelope, [key])
        except Invalid:
            continue
        return key.id
    raise AssertionError("one of them opened it")
