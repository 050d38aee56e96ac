"""Live windows: what ``capture.closed`` and ``telemetry.window`` tell of the last quarter of an hour. Pure functions.

A window's value keeps the contribution of each segment under the segment's id, and each settled figure under its
window's id, with the event's sequence. So an event that comes again overwrites what it said, an older one changes
nothing, and the order of different segments does not matter: redelivery can neither double nor lose a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..core.errors import Invalid
from ..core.events import Envelope
from .windows import WINDOW_S, Cell, Windows, window_of

KEEP_S = 900
"""Windows that ended longer ago are no longer live: the settled ones are in the store."""
TOPICS = ("capture.closed", "telemetry.window")

Value = dict[str, Any]
"""JSON, as it is kept: ``{"parts": {segment: {sequence, image, cells}}, "settled": {id: {sequence, window}}}``."""


def key_of(workspace: str, deployment: str, start: int) -> str:
    """``default/iris@1763906700``: the key of one window."""
    return f"{workspace}/{deployment}@{start}"


def expired(start: int, now: float) -> bool:
    """Whether a window is no longer live."""
    return start + WINDOW_S <= now - KEEP_S


def patches(event: Envelope) -> dict[str, tuple[int, Value]]:
    """What an event says of which windows: key → (start, patch). Raises Invalid when it makes no sense.

    A ``capture.closed`` without ``cells`` was written by an older release: it says nothing of windows.
    """
    try:
        deployment = str(event.data["deployment"])
        found = _settled(event) if event.topic == "telemetry.window" else _parts(event)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise Invalid(f"{event.type} of {event.subject} does not say what it should: {exc!r}") from exc
    return {key_of(event.workspace, deployment, start): (start, patch) for start, patch in found.items()}


def fold(value: Mapping[str, Any] | None, patch: Value) -> Value | None:
    """The window with a patch in it; None when that changes nothing."""
    folded: Value = {"parts": dict((value or {}).get("parts", {})), "settled": dict((value or {}).get("settled", {}))}
    changed = False
    for group in ("parts", "settled"):
        for name, said in patch.get(group, {}).items():
            known = folded[group].get(name)
            if known is None or known["sequence"] < said["sequence"]:
                folded[group][name] = said
                changed = True
    return folded if changed else None


def answers(deployment: str, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The windows that a value holds, one for each image and model. ``provisional``: not settled yet, or more calls
    than the settled figure knows have come since."""
    windows = Windows(WINDOW_S)
    for part in value["parts"].values():
        windows.add(part["image"], map(Cell.of, part["cells"]))
    counted = {_name(w): w for w in windows.answers(deployment)}
    settled = {_name(said["window"]): said["window"] for said in value["settled"].values()}
    best = []
    for name in sorted({*counted, *settled}):
        provisional = name not in settled or counted.get(name, settled[name])["requests"] > settled[name]["requests"]
        best.append({**(counted if provisional else settled)[name], "provisional": provisional})
    return best


def _name(window: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(window["start"]), str(window["image"]), str(window["model"])


def _parts(event: Envelope) -> dict[int, Value]:
    by_window: dict[int, list[Any]] = {}
    for cell in map(Cell.of, event.data.get("cells", [])):
        by_window.setdefault(window_of(cell.slot, WINDOW_S), []).append(cell.plain())
    image = str(event.data["image"])
    return {start: {"parts": {event.subject: {"sequence": event.sequence, "image": image, "cells": cells}}}
            for start, cells in by_window.items()}


def _settled(event: Envelope) -> dict[int, Value]:
    names = ("start", "end", "deployment", "image", "model", "requests", "errors", "latency_ms")
    window = {name: event.data[name] for name in names}
    window["requests"] = int(window["requests"])
    start = int(datetime.fromisoformat(str(window["start"])).timestamp())
    if start % WINDOW_S:
        return {}
    return {start: {"settled": {event.subject: {"sequence": event.sequence, "window": window}}}}
