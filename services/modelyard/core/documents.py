"""Documents: what a store keeps. Identity is (workspace, kind, id).

A document is frozen; ``doc.evolve(field=value)`` gives the next one. Fields of ``Document`` named in
``INTERNAL`` belong to the house and never leave it: ``view()`` is what GET answers and what events carry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from .errors import Invalid

DIGEST = re.compile(r"^sha256:[0-9a-f]{64}\Z")
INTERNAL = frozenset({"revision", "sequence", "made_by", "deleted", "due", "lease", "attempts"})


def rfc3339(moment: datetime) -> str:
    """A moment as RFC 3339 in UTC with microseconds: ``2026-11-23T14:05:06.000007Z`` (sorts as text)."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Time = Annotated[datetime, PlainSerializer(rfc3339, return_type=str, when_used="json")]


STORED = "stored"
"""The validation context of what a store kept, in which nothing is refused or dropped for being unknown."""


class Part(BaseModel):
    """What lies inside a document. As in the document itself, what a newer version added is kept, and shown to
    nobody."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Document(BaseModel):
    """One unit of state: everything that must change together.

    ``generation`` is what users see (the ETag): only a caller's accepted change raises it.
    ``revision`` is the store's: 0 = never stored; every commit raises it by one.
    ``sequence`` counts the events made for this subject; it survives deletion and re-creation.
    ``due`` is when a loop should look at this document next (None: never). A claim sets ``lease`` to the
    claimer's token and ``due`` to the end of the lease, so a crashed claim becomes due again by itself.
    ``attempts`` counts a loop's failures in a row. ``deleted`` marks a tombstone, ``made_by`` the event id
    or Idempotency-Key that created it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")  # a newer version's fields are kept, and shown to nobody

    kind: ClassVar[str]
    """The stored name of this type, unique over all services: ``model``, ``image``, ``deployment``."""
    indexed: ClassVar[frozenset[str]] = frozenset()
    """Fields that ``find`` may filter by, beside ``INDEXED_ALWAYS``. A list field matches by containment,
    a text map (tags, properties) by key or by key and value."""
    hidden: ClassVar[frozenset[str]] = frozenset()
    """Fields of this type that ``view`` leaves out, beside ``INTERNAL``."""
    unpublished: ClassVar[frozenset[str]] = frozenset()
    """Fields that GET answers and events leave out: what callers may have put their data into."""

    workspace: str = "default"
    id: str
    generation: int = 1
    created: Time = Field(default_factory=lambda: datetime.now(UTC))
    updated: Time = Field(default_factory=lambda: datetime.now(UTC))

    revision: int = 0
    sequence: int = 0
    made_by: str | None = None
    deleted: bool = False
    due: Time | None = None
    lease: str | None = None
    attempts: int = 0

    def evolve(self, **changes: Any) -> Self:
        """The same document with these fields replaced (not validated again: callers pass valid values)."""
        return self.model_copy(update=changes)

    def view(self) -> dict[str, Any]:
        """The public JSON of this document: no internal, hidden or unknown field, times as RFC 3339 text."""
        newer = {name: found for name in with_parts(type(self)) - self.hidden
                 if (found := unknown(getattr(self, name)))}
        out = {*INTERNAL, *self.hidden, *(self.model_extra or ())}
        return self.model_dump(mode="json", exclude=out if not newer else {**newer, **dict.fromkeys(out, True)})

    @classmethod
    def restored(cls, body: str | bytes) -> Self:
        """What a store kept, also when a newer version wrote it: fields that are new are no error, and those of the
        document and of its parts are written again. Raises Invalid for what this version cannot read."""
        try:
            return cls.model_validate_json(body, extra="allow", context=STORED)
        except ValidationError as exc:
            told = exc.errors()[0]["msg"]
            raise Invalid(f"a stored {cls.kind} cannot be read by this version of Modelyard: {told}",
                          code="unreadable") from exc


@cache
def with_parts(type_: type[BaseModel]) -> frozenset[str]:
    """The fields that may hold models."""
    def may(kind: Any) -> bool:
        return (isinstance(kind, type) and issubclass(kind, BaseModel)) or any(map(may, get_args(kind)))

    return frozenset(name for name, field in type_.model_fields.items() if may(field.annotation))


def unknown(value: Any) -> dict[Any, Any]:
    """What a newer version added to a value, at any depth, as pydantic's ``exclude``."""
    inside: Iterable[tuple[Any, Any]] = ()
    out: dict[Any, Any] = {}
    if isinstance(value, BaseModel):
        out = dict.fromkeys(value.model_extra or (), True)
        inside = ((name, getattr(value, name)) for name in with_parts(type(value)))
    elif isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    return out | {key: found for key, item in inside if (found := unknown(item))}


def plain(part: BaseModel) -> dict[str, Any]:
    """A part's JSON without what is unknown here: for those who know no more than we do."""
    return part.model_dump(mode="json", exclude=unknown(part))


def carried(old: Any, new: Any) -> Any:
    """A caller's new value of a field, with what a newer version had added inside the old one and he cannot know."""
    if isinstance(new, BaseModel) and isinstance(old, BaseModel) and type(old) is type(new):
        inner = {name: carried(getattr(old, name), getattr(new, name)) for name in type(new).model_fields}
        return new.model_copy(update={**(old.model_extra or {}), **(new.model_extra or {}), **inner})
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: carried(old.get(key), item) for key, item in new.items()}
    if isinstance(new, list) and isinstance(old, list) and any(isinstance(item, BaseModel) for item in new):
        return [next((one for was in old if _bare(one := carried(was, item)) == _bare(was)), item) for item in new]
    return new


def _bare(value: Any) -> Any:
    return plain(value) if isinstance(value, BaseModel) else value


INDEXED_ALWAYS = frozenset({"id", "created", "updated", "due", "made_by", "deleted"})


@dataclass(frozen=True)
class Range:
    """``gte <= field < lt``; either end may be open. Values are text, numbers or datetimes."""

    gte: Any = None
    lt: Any = None


Where = Mapping[str, Any]
"""``{"field": value}`` equality (containment in a list field), ``{"tags": {"k": "v"}}`` every pair present
(``{"k": None}``: the key), ``{"tags": "k"}`` key present, ``{"field": Range(…)}`` at most one range. All must hold."""


@dataclass(frozen=True, order=True)
class Ref:
    """``name:version`` → ``Ref("iris", 4)``; ``name`` → version None; ``name@alias`` → alias.

    >>> Ref.parse("iris:4"), Ref.parse("iris").version, Ref.parse("iris@champion").alias
    (Ref(name='iris', version=4, alias=None), None, 'champion')
    >>> str(Ref("iris", 4))
    'iris:4'
    """

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Raises Invalid for anything that is not one of the three forms."""
        if "@" in text:
            name, _, alias = text.partition("@")
            if name and alias:
                return cls(name, alias=alias)
        elif ":" in text:
            name, _, version = text.rpartition(":")
            if name and version.isascii() and version.isdigit() and 0 < int(version) < 2**63:
                return cls(name, int(version))
        elif text:
            return cls(text)
        raise Invalid(f"'{text}' is not a reference; write name, name:version or name@alias", field="ref")

    def __str__(self) -> str:
        if self.alias is not None:
            return f"{self.name}@{self.alias}"
        return self.name if self.version is None else f"{self.name}:{self.version}"
