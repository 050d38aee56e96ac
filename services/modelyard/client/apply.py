"""Declarative documents: what a yard should hold, compared with what it holds."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ValidationError

from ..core.documents import DIGEST, Ref
from ..core.errors import Invalid, NotFound
from ..core.specs import DeploymentSpec, ImageSpec, ModelSpec, Spec
from .contexts import upload_context
from .requirements import read_requirements
from .uploads import Artifact, OnProgress, inspect, upload

if TYPE_CHECKING:
    from .client import AsyncClient

KINDS: dict[str, type[Spec]] = {"Model": ModelSpec, "Image": ImageSpec, "Deployment": DeploymentSpec}
MUTABLE = frozenset({"tags", "description", "properties"})
"""Fields of a model or an image that a version may still change; anything else is a new version."""
Action = Literal["created", "updated", "unchanged"]


@dataclass(frozen=True)
class Change:
    """What became (or, in a dry run, would become) of one document.

    ``id`` is ``iris:4``; a version that a dry run would create has no number yet: ``iris:?``. ``diff`` is a
    unified diff of the caller's fields in YAML, empty when unchanged.
    """

    kind: str
    id: str
    action: Action
    diff: str = ""
    document: Mapping[str, Any] = field(default_factory=dict)


async def apply(
    yard: AsyncClient, documents: Sequence[Mapping[str, Any]], root: Path, dry_run: bool,
    on_progress: OnProgress | None,
) -> list[Change]:
    """As ``AsyncClient.apply``. Every document is checked before the first is applied."""
    for position, document in enumerate(documents, start=1):
        if not isinstance(document, Mapping) or document.get("kind") not in KINDS:
            raise Invalid(f"document {position} needs kind: {', '.join(KINDS)}", field="kind")
        if not isinstance(document.get("name"), str):
            raise Invalid(f"document {position} ({document['kind']}) needs a name", field="name")
    work = _Apply(yard, root, dry_run, on_progress)
    prepared = [(str(d["kind"]), await work.prepare(str(d["kind"]), d)) for d in documents]
    return [await work.one(kind, spec) for kind, spec in prepared]


class _Apply:
    """One run. ``made`` remembers what documents above have become, so that references below mean them."""

    def __init__(self, yard: AsyncClient, root: Path, dry_run: bool, on_progress: OnProgress | None) -> None:
        self.yard = yard
        self.root = root
        self.dry_run = dry_run
        self.on_progress = on_progress
        self.made: dict[tuple[str, str], str] = {}

    async def prepare(self, kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Files become digests; the result is checked by the same rules as the server's."""
        body = {k: v for k, v in document.items() if k != "kind"}
        if kind == "Model" and "path" in body:
            found = await self._stored(self.root / str(body.pop("path")))
            told = {"filename": None if found.unpack else found.filename, "framework": found.framework}
            body = {k: v for k, v in told.items() if v is not None} | body
            body |= {"artifact": found.digest, "unpack": found.unpack}
        if kind == "Image":
            for key in ("score", "lock", "dockerfile"):
                if isinstance(body.get(key), str) and not DIGEST.match(body[key]):
                    body[key] = (await self._stored(self.root / body[key], context=key == "dockerfile")).digest
            if isinstance(body.get("requirements"), str):
                needs = await asyncio.to_thread(read_requirements, self.root / body["requirements"])
                body["requirements"] = needs.requirements
                if needs.constraints:
                    body["constraints"] = [*(body.get("constraints") or []), *needs.constraints]
                if needs.python and body.get("python") is None:
                    body["python"] = needs.python
        return checked(kind, body)

    async def _stored(self, source: Path, context: bool = False) -> Artifact:
        if context:
            return await upload_context(self.yard.http, source, self.on_progress, dry_run=self.dry_run)
        if self.dry_run:
            return (await asyncio.to_thread(inspect, source, self.on_progress))[0]
        return await upload(self.yard.http, source, self.on_progress)

    async def one(self, kind: str, wanted: dict[str, Any]) -> Change:
        """Compares with the newest and writes what differs."""
        wanted = await self._resolved(kind, wanted)
        found = await self._newest(kind, wanted["name"])
        now = checked(kind, {k: v for k, v in found.items() if k in KINDS[kind].model_fields}) if found else {}
        differs = {k for k, v in wanted.items() if v is not None and v != now.get(k)}
        diff = _diff(kind, now, {**wanted, **{k: now.get(k) for k in wanted if k not in differs}}) if differs else ""
        if found and not differs:
            self.made[kind, wanted["name"]] = str(found["id"])
            return Change(kind, str(found["id"]), "unchanged", document=found)
        patching = bool(found) and (kind == "Deployment" or _only_mutable(differs, wanted, now))
        action: Action = "updated" if patching else "created"
        if self.dry_run:
            id = str(found["id"]) if patching else wanted["name"] + ("" if kind == "Deployment" else ":?")
            self.made[kind, wanted["name"]] = id
            return Change(kind, id, action, diff)
        document = await self._write(kind, wanted, now, str(found["id"]) if found and patching else None)
        self.made[kind, wanted["name"]] = str(document["id"])
        return Change(kind, str(document["id"]), action, diff, document)

    async def _newest(self, kind: str, name: str) -> dict[str, Any]:
        try:
            if kind == "Model":
                return (await self.yard.models.get(name)).document
            if kind == "Deployment":
                return (await self.yard.deployments.get(name)).document
        except NotFound:
            return {}
        images = await self.yard.images.list(name=name)
        newest = max(images, key=lambda i: i.version, default=None)
        return newest.document if newest and newest.phase not in ("failed", "cancelled") else {}

    async def _resolved(self, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
        if kind == "Image":
            return {**spec, "models": [await self._exact("Model", ref) for ref in spec["models"]]}
        if kind == "Deployment" and spec["image"]:
            return {**spec, "image": await self._exact("Image", spec["image"])}
        if kind == "Deployment":
            traffic = [{**t, "image": await self._exact("Image", t["image"])} for t in spec["traffic"]]
            return {**spec, "traffic": traffic}
        return spec

    async def _exact(self, kind: str, text: str) -> str:
        """The version a reference means now: what a document above became, else what the server says."""
        ref = Ref.parse(text)
        if ref.version is not None:
            return text
        if ref.alias is None and (kind, ref.name) in self.made:
            return self.made[kind, ref.name]
        found = await (self.yard.models.get(text) if kind == "Model" else self.yard.images.get(text))
        return found.id

    async def _write(self, kind: str, wanted: dict[str, Any], now: dict[str, Any], id: str | None) -> dict[str, Any]:
        # What nobody asked for is not sent: an older server refuses a field that it does not know.
        body = KINDS[kind].model_validate(wanted).model_dump(mode="json", exclude_defaults=True)
        if kind == "Deployment":
            return (await self.yard.deployments.put(body)).document
        if id is None:
            created = await (self.yard.models.create(body) if kind == "Model" else self.yard.images.create(body))
            return created.document
        part = self.yard.models if kind == "Model" else self.yard.images
        tags = {**dict.fromkeys(set(now["tags"]) - set(wanted["tags"])), **wanted["tags"]}
        added = {k: v for k, v in wanted["properties"].items() if k not in now["properties"]}
        changed = await part.update(
            id, tags=tags, properties=added or None, description=wanted["description"])
        return changed.document


def checked(kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's fields with defaults filled in. Raises Invalid with every problem of the document."""
    try:
        return KINDS[kind].model_validate(body, extra="forbid").model_dump(mode="json")
    except ValidationError as exc:
        errors = [{"field": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in exc.errors()]
        told = "; ".join(f"{e['field']}: {e['message']}" if e["field"] else e["message"] for e in errors)
        raise Invalid(f"{kind} '{body.get('name')}': {told}", errors=errors) from exc


def _only_mutable(differs: set[str], wanted: dict[str, Any], now: dict[str, Any]) -> bool:
    kept = all(wanted["properties"].get(k) == v for k, v in now["properties"].items())
    return differs <= MUTABLE and kept


def _diff(kind: str, now: dict[str, Any], wanted: dict[str, Any]) -> str:
    def text(spec: dict[str, Any]) -> list[str]:
        kept = {k: v for k, v in spec.items() if v not in (None, {}, [], "", False)}
        dumped: str = yaml.safe_dump({"kind": kind, **kept}, sort_keys=False, allow_unicode=True)
        return dumped.splitlines(keepends=True) if kept else []

    return "".join(difflib.unified_diff(text(now), text(wanted), "in the yard", "in the file"))
