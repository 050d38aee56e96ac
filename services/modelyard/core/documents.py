"""Documents: what a store keeps. Identity is (workspace, kind, id).

A document is frozen; ``doc.evolve(field=value)`` gives the next one. Fields of ``Document`` named in
``INTERNAL`` belong to the house and never leave it: ``view()`` is what GET answers and what events carry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from .errors import Invalid

DIGEST = re.compile(r"^sha256:[0-9a-f]{64}\Z")
INTERNAL = frozenset({"revision", "sequence", "made_by", "deleted", "due", "lease", "attempts"})


def rfc3339(moment: datetime) -> str:
    """A moment as RFC 3339 in UTC with microseconds: ``2026-11-23T14:05:06.000007Z`` (sorts as text)."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Time = Annotated[datetime, PlainSerializer(rfc3339, return_type=str, when_used="json")]


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
        return self.model_dump(mode="json", exclude={*INTERNAL, *self.hidden, *(self.model_extra or ())})

    @classmethod
    def restored(cls, body: str | bytes) -> Self:
        """What a store kept, also when a newer version wrote it: fields that are new are no error, and those of the
        document itself are written again. Raises Invalid for what this version cannot read."""
        try:
            return cls.model_validate_json(body, extra="allow")
        except ValidationError as exc:
            told = exc.errors()[0]["msg"]
            raise Invalid(f"a stored {cls.kind} cannot be read by this version of Modelyard: {told}",
                          code="unreadable") from exc


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
