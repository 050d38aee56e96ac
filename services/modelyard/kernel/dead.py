"""What could not be handled: parked keys (waiting for a failure to pass) and dead letters (waiting for a person).

Both are documents of the consuming service, so an event is acknowledged only after it is safe in one of them.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal

from ..core.documents import Document, Part, Time
from ..core.errors import AlreadyApplied, Conflict, Invalid, ModelyardError, NotFound
from ..core.events import Envelope, Fact
from ..ports.bus import Delivery
from ..ports.store import DocumentStore
from .observe import DEAD_LETTERS, trace_from
from .service import RETRIES, Context, Service

PARK_S = timedelta(seconds=0.5)
MAX_PARKED = 256
"""Events that wait behind one parked key; what comes after becomes a dead letter, to be replayed by hand."""


class Raw(Part):
    """One record as it lay on the bus: ``text`` is UTF-8, or base64 when it was not text."""

    topic: str
    key: str
    origin: str
    text: str
    encoding: Literal["utf-8", "base64"] = "utf-8"

    @classmethod
    def of(cls, delivery: Delivery) -> Raw:
        try:
            about = cls(topic=delivery.topic, key=delivery.key, origin=delivery.origin, text=delivery.raw.decode())
        except UnicodeDecodeError:
            text = base64.b64encode(delivery.raw).decode()
            about = cls(topic=delivery.topic, key=delivery.key, origin=delivery.origin, text=text, encoding="base64")
        return about

    def data(self) -> bytes:
        return self.text.encode() if self.encoding == "utf-8" else base64.b64decode(self.text)

    def envelope(self) -> Envelope:
        """Decoded and of the version this house speaks; Invalid otherwise."""
        envelope = Envelope.decode(self.data())
        if envelope.type != f"{self.topic}.v1":
            raise Invalid(f"an event of type {envelope.type} on topic {self.topic} is unknown here; "
                          "a newer Modelyard may have written it")
        return envelope


class ParkedKey(Document):
    """The events of one (topic, key) whose first one meets a failure that may pass, in order."""

    kind: ClassVar[str] = "parked-key"
    indexed: ClassVar[frozenset[str]] = frozenset({"topic"})
    topic: str
    key: str
    events: list[Raw]
    error: str


class DeadLetter(Document):
    """An event that was given up. ``event`` is the record as it was; ``attempts_made`` counts handler calls."""

    kind: ClassVar[str] = "dead-letter"
    indexed: ClassVar[frozenset[str]] = frozenset({"topic", "subject", "event_id"})
    group: str
    topic: str
    key: str
    subject: str | None = None
    event_id: str | None = None
    event_sequence: int = 0
    event: Raw
    attempts_made: int
    error: str
    message: str
    first_failed: Time
    last_failed: Time
    outcome: str | None = None


class Seen(Document):
    """The highest sequence this service has handled of a subject that has had a dead letter (id: ``seen_id``)."""

    kind: ClassVar[str] = "seen-sequence"
    newest: int = 0


def parked_id(topic: str, key: str) -> str:
    return f"{topic}/{key}"


def workspace_of(key: str) -> str:
    """Of a partition key ``<workspace>/<subject>``; a foreign key belongs to ``default``."""
    workspace, slash, _ = key.partition("/")
    return workspace if slash and workspace else "default"


async def upsert(ctx: Context, type_: type[Any], id: str, workspace: str, fn: Any, *facts: Fact) -> Any:
    """Commits ``fn(newest, tombstones included, or None)`` → document or None (leave it); reads again on Conflict."""
    for _ in range(RETRIES):
        old = await ctx.store.get(type_, id, workspace=workspace, tombstone=True)
        doc = fn(old)
        if doc is None:
            return old
        kept = {"revision": old.revision, "sequence": old.sequence} if old else {}
        try:
            return await ctx.commit(doc.evolve(**kept), *facts)
        except Conflict:
            continue
    raise Conflict(f"{type_.kind} '{id}' changes too often; try again")


async def is_parked(ctx: Context, delivery: Delivery) -> bool:
    doc = await ctx.store.get(ParkedKey, parked_id(delivery.topic, delivery.key), workspace=workspace_of(delivery.key))
    return doc is not None


async def park(ctx: Context, delivery: Delivery, error: BaseException, *, behind: bool) -> bool:
    """Puts the event behind those parked for its key. False when nothing was parked: with ``behind`` set the key is
    parked only if it is already, else it is opened; a full one takes no more (its events are dead letters)."""
    raw, id = Raw.of(delivery), parked_id(delivery.topic, delivery.key)
    workspace, taken = workspace_of(delivery.key), False

    def add(old: ParkedKey | None) -> ParkedKey | None:
        nonlocal taken
        live = old is not None and not old.deleted
        events = list(old.events) if old is not None and live else []
        taken = any(e.origin == raw.origin for e in events)
        if taken or (behind and not live) or len(events) >= MAX_PARKED:
            return None
        taken = True
        if old is not None and live:
            return old.evolve(events=[*events, raw], updated=ctx.now())
        return ParkedKey(id=id, workspace=workspace, topic=delivery.topic, key=delivery.key, events=[raw],
                         error=describe(error), due=ctx.now() + PARK_S, created=ctx.now(), updated=ctx.now())

    await upsert(ctx, ParkedKey, id, workspace, add)
    return taken


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2048]


async def bury(ctx: Context, raw: Raw, envelope: Envelope | None, error: BaseException, attempts: int,
               first: datetime | None = None) -> None:
    """Makes a dead letter, once for each event however often it is delivered, and tells of it on ``dead.<service>``;
    remembers how far its subject was."""
    name = f"{raw.topic} {envelope.id}" if envelope else f"{raw.topic} {raw.origin}"
    id, now = hashlib.sha256(f"{ctx.service} {name}".encode()).hexdigest()[:16], ctx.now()
    letter = DeadLetter(
        id=id, workspace=envelope.workspace if envelope else workspace_of(raw.key), created=now, updated=now,
        group=ctx.service, topic=raw.topic, key=raw.key, event=raw, attempts_made=attempts,
        subject=envelope.subject if envelope else None, event_id=envelope.id if envelope else None,
        event_sequence=int(envelope.sequence) if envelope else 0,
        error=getattr(error, "code", None) or type(error).__name__, message=describe(error),
        first_failed=first or now, last_failed=now,
    )
    if envelope:
        await note_seen(ctx, envelope, create=True)
    notice = Fact(f"dead.{ctx.service}", {"event": None})  # the letter itself is read by its id
    stored = await upsert(ctx, DeadLetter, id, letter.workspace, lambda old: None if old else letter, notice)
    if stored.revision == 1 and stored.created == now:
        DEAD_LETTERS.labels(ctx.service, raw.topic).inc()


def seen_id(envelope: Envelope) -> str:
    """Whose events are numbered together: ids are unique within a source's kind only."""
    return f"{envelope.source} {envelope.subject}"


async def note_seen(ctx: Context, envelope: Envelope, *, create: bool = False) -> None:
    """Keeps the newest sequence of a subject that has had a dead letter; costs one read for any other subject."""
    if not create and await ctx.store.get(Seen, seen_id(envelope), workspace=envelope.workspace) is None:
        return
    number = int(envelope.sequence) - (1 if create else 0)

    def raise_to(old: Seen | None) -> Seen | None:
        if old is not None and old.newest >= number:
            return None
        seen = old or Seen(id=seen_id(envelope), workspace=envelope.workspace)
        return seen.evolve(newest=number, updated=ctx.now())

    await upsert(ctx, Seen, seen_id(envelope), envelope.workspace, raise_to)


async def dead_letters(store: DocumentStore, *, workspace: str = "default", topic: str | None = None,
                       after: tuple[str, str] | None = None, limit: int = 100) -> list[DeadLetter]:
    """The newest first; ``after`` = (created, id) of the last one seen."""
    where = {} if topic is None else {"topic": topic}
    return await store.find(DeadLetter, where, workspace=workspace, order="-created", after=after, limit=limit)


async def dead_letter(store: DocumentStore, id: str, *, workspace: str = "default") -> DeadLetter:
    """One of them. Raises NotFound."""
    letter = await store.get(DeadLetter, id, workspace=workspace)
    if letter is None:
        raise NotFound(f"there is no dead letter '{id}'", kind=DeadLetter.kind, id=id)
    return letter


async def drop(ctx: Context, id: str, *, workspace: str = "default") -> None:
    """Gives the event up for good. Raises NotFound."""
    await dead_letter(ctx.store, id, workspace=workspace)
    await _close(ctx, id, workspace, "dropped")


async def replay(ctx: Context, service: Service, id: str, *, workspace: str = "default") -> str:
    """Hands the event to its handler again → ``applied``, or ``superseded`` when this service has since handled a
    newer event of the same subject (then it is not handled). Either way the letter is gone.

    Raises what the handler raises, Invalid when it is a fault in the handler, NotFound; the letter stays then.
    """
    letter = await dead_letter(ctx.store, id, workspace=workspace)
    handler = service.handlers.get(letter.topic)
    if handler is None:
        raise Invalid(f"{service.name} no longer handles {letter.topic}; drop the letter", code="no-handler")
    envelope = letter.event.envelope()
    seen = await ctx.store.get(Seen, seen_id(envelope), workspace=envelope.workspace)
    if seen is not None and seen.newest > int(envelope.sequence):
        await _close(ctx, id, workspace, "superseded")
        return "superseded"
    try:
        with trace_from(envelope.traceparent):
            await handler(ctx, envelope)
    except AlreadyApplied:
        pass
    except Exception as exc:
        await _failed_again(ctx, id, workspace, exc)
        if isinstance(exc, ModelyardError):
            raise
        raise Invalid(f"the event failed again: {describe(exc)}", code="replay-failed") from exc
    await note_seen(ctx, envelope)
    await _close(ctx, id, workspace, "applied")
    return "applied"


async def _failed_again(ctx: Context, id: str, workspace: str, exc: Exception) -> None:
    await ctx.change(DeadLetter, id, lambda d: (d.evolve(
        attempts_made=d.attempts_made + 1, message=describe(exc), last_failed=ctx.now(), updated=ctx.now(),
        error=getattr(exc, "code", None) or type(exc).__name__), ()), workspace=workspace)


async def _close(ctx: Context, id: str, workspace: str, outcome: str) -> None:
    """A tombstone stays, so that a late repeat of the same record makes no second letter."""
    try:
        await ctx.change(DeadLetter, id, lambda d: (d.evolve(
            deleted=True, outcome=outcome, updated=ctx.now()), ()), workspace=workspace)
    except NotFound:
        return  # somebody else closed it meanwhile
