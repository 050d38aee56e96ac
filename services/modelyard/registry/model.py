"""What the registry keeps: artifacts, models and the aliases of a name. Pure: documents and their transitions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from ..core.documents import Document, Range, Ref, Time, carried
from ..core.errors import Invalid
from ..core.specs import Dataset, ModelSpec
from .claims import Seen

CHANGEABLE = ("tags", "properties", "description")
HOLD_KINDS = ("image", "deployment", "alias")


class Artifact(Document):
    """The record of one artifact in one workspace; ``id`` is its digest, ``size`` in bytes.

    ``fate``: ``kept``; ``doomed`` when its last model went (whoever wants it again rescues it by one commit);
    ``erasing`` from then on nobody can, until the record is a tombstone and an upload may begin anew.
    """

    kind = "artifact"
    hidden = frozenset({"fate"})

    size: int
    fate: Literal["kept", "doomed", "erasing"] = "kept"


LET_GO = 64
"""So many images that let go of a model it remembers: for as long as a call of theirs may still be on its way."""


class Model(Document):
    """One version of a name. ``holds`` are those who need it, ``"<kind>/<holder>"`` → since when; ``let_go`` the images
    that needed it last.

    ``place`` sorts by name, then version. ``marks`` of the highest version hold ``latest`` and ``latest/<name>``.
    ``file_signature`` is what the file says itself where the caller gave a signature of his own; an image that serves
    the model by its flavour is built only where the two agree.
    """

    kind = "model"
    indexed = frozenset({"name", "place", "marks", "artifact", "framework", "run", "tags", "properties"})
    unpublished = frozenset({"sample"})
    hidden = frozenset({"marks", "holds", "let_go"})   # and ``place``, which lists may be ordered by

    name: str
    version: int
    artifact: str
    size: int
    unpack: bool = False
    framework: str
    framework_version: str | None = None
    filename: str | None = None
    trusted: bool = False
    tags: dict[str, str] = {}
    properties: dict[str, str] = {}
    description: str = ""
    signature: dict[str, Any] | None = None
    file_signature: dict[str, Any] | None = None
    sample: dict[str, Any] | list[Any] | None = None
    parent: str | None = None
    run: str | None = None
    experiment: str | None = None
    datasets: list[Dataset] = []

    place: str
    marks: tuple[str, ...] = ()
    holds: dict[str, Time] = {}
    let_go: tuple[str, ...] = ()

    @property
    def aliases(self) -> list[str]:
        """The aliases that point here."""
        return sorted(holder for kind, holder in map(split_hold, self.holds) if kind == "alias")

    def view(self) -> dict[str, Any]:
        return {k: v for k, v in super().view().items() if k != "place"} | {"aliases": self.aliases}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """The schema of what ``view`` gives."""
        schema: dict[str, Any] = handler.resolve_ref_schema(handler(core))
        schema["properties"].pop("place")
        schema["required"].remove("place")
        schema["properties"]["aliases"] = {"type": "array", "items": {"type": "string"}, "title": "Aliases"}
        return schema

    @property
    def download_name(self) -> str:
        """What the file is called when it is fetched."""
        return self.filename or f"{self.name}-{self.version}" + (".tar" if self.unpack else "")


class ModelName(Document):
    """What all versions of a name share: ``aliases``, alias → version."""

    kind = "model-name"

    name: str
    aliases: dict[str, int] = {}


def place(name: str, version: int) -> str:
    """Sorts as text by name, then version: the blank sorts before all letters of a name."""
    return f"{name} {version:019d}"


def versions_of(name: str) -> Range:
    """The places of all versions of one name."""
    return Range(gte=f"{name} ", lt=f"{name}!")


def latest_marks(name: str) -> tuple[str, ...]:
    return ("latest", f"latest/{name}")


def split_hold(hold: str) -> tuple[str, str]:
    """``image/iris-scorer:7`` → ``("image", "iris-scorer:7")``."""
    kind, _, holder = hold.partition("/")
    return kind, holder


def exact(text: str) -> str:
    """``iris:4``; Invalid for a reference that does not name a version."""
    ref = Ref.parse(text)
    if ref.version is None:
        raise Invalid(f"'{text}' does not name a version; write {ref.name}:VERSION", field="ref")
    return str(ref)


def made(spec: ModelSpec, version: int, *, workspace: str, size: int, seen: Seen, parent: str | None,
         made_by: str | None, now: datetime) -> Model:
    """Version ``version`` of the name, as first stored: the newest, so marked as the latest."""
    given = {"framework": seen.framework, "signature": spec.signature or seen.signature, "parent": parent,
             "file_signature": seen.signature if spec.signature else None,
             "sample": seen.sample if spec.sample is None else spec.sample}
    return Model(
        **{**dict(spec), **given},
        workspace=workspace, id=f"{spec.name}:{version}", version=version, size=size,
        place=place(spec.name, version), marks=latest_marks(spec.name), made_by=made_by, created=now, updated=now)


def patched(doc: Model, wanted: ModelSpec, now: datetime) -> tuple[Model, dict[str, Any]] | None:
    """The model with the caller's changes and the old values of what changed; None when nothing did.

    Raises Invalid (``write-once``), naming every field and property that may not change.
    """
    errors = [{"field": field, "message": "is written once, at registration"}
              for field in sorted(ModelSpec.model_fields.keys() - {*CHANGEABLE})
              if carried(getattr(doc, field), getattr(wanted, field)) != getattr(doc, field)]
    errors += [{"field": f"properties.{key}", "message": f"is '{value}' and cannot change; properties can be added"}
               for key, value in sorted(doc.properties.items()) if wanted.properties.get(key) != value]
    if errors:
        told = "; ".join(f"{error['field']} {error['message']}" for error in errors)
        raise Invalid(f"{doc.id}: {told}", code="write-once", errors=errors)
    new = {field: getattr(wanted, field) for field in CHANGEABLE}
    previous = {field: getattr(doc, field) for field, value in new.items() if value != getattr(doc, field)}
    if not previous:
        return None
    return doc.evolve(**new, generation=doc.generation + 1, updated=now), previous


def held(doc: Model, kind: str, holder: str, now: datetime) -> Model | None:
    """With the hold, or None when it is there; or when it comes late: a call of a builder that died may arrive when the
    image has gone, and an image's id is never given again."""
    hold = f"{kind}/{holder}"
    return None if hold in doc.holds or hold in doc.let_go else doc.evolve(holds={**doc.holds, hold: now})


def released(doc: Model, kind: str, holder: str) -> Model | None:
    """Without the hold, or None when there is nothing to change. That an image let go is kept even when its hold is not
    there (yet)."""
    hold = f"{kind}/{holder}"
    let_go = doc.let_go if kind != "image" or hold in doc.let_go else (*doc.let_go, hold)[-LET_GO:]
    if hold not in doc.holds and let_go == doc.let_go:
        return None
    return doc.evolve(holds={k: v for k, v in doc.holds.items() if k != hold}, let_go=let_go)


def aliased(doc: ModelName, aliases: Mapping[str, int], now: datetime) -> tuple[ModelName, dict[str, Any]] | None:
    """With these aliases, and the old ones; None when they are the same."""
    if doc.aliases == aliases:
        return None
    new = doc.evolve(aliases=dict(aliases), generation=doc.generation + bool(doc.revision), updated=now)
    return new, {"aliases": doc.aliases}
