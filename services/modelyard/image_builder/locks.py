"""Locks: exact versions with hashes, one package a line, as ``pip`` and ``uv`` read and write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ..core.requirements import logical, requirement
from .memo import key

HASH = re.compile(r"\s--hash[= ](sha256:[0-9a-f]{64})(?=\s|$)")
EMPTY = "an empty lock: no packages at all, not even the scoring server's"


@dataclass(frozen=True)
class Pin:
    """One locked package: ``text`` is the requirement (``numpy==2.4.6``, or name @ URL), hashes are of its wheels."""

    name: str
    text: str
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class Lock:
    """A lock in one form, whatever its comments and order were."""

    pins: tuple[Pin, ...]

    @property
    def text(self) -> str:
        return "".join(
            f"{p.text} \\\n" + " \\\n".join(f"    --hash={h}" for h in p.hashes) + "\n" for p in self.pins)

    @property
    def digest(self) -> str:
        return "sha256:" + key(self.text)

    def missing(self, needed: Sequence[str]) -> list[str]:
        """Which of these requirements no pin is for. One with a marker is of use where it can be had: the server does
        without it, so a lock of before it is as good as it was."""
        have = {p.name for p in self.pins}
        return sorted({package(need) for need in needed if Requirement(need).marker is None} - have)


def package(text: str) -> str:
    """``Scikit_Learn>=1`` → ``scikit-learn``."""
    return canonicalize_name(Requirement(text).name)


def read_lock(text: str) -> tuple[Lock, list[str]]:
    """The lock, and what is wrong with it, each with its line. No package at all is fine."""
    pins: dict[str, Pin] = {}
    problems: list[str] = []
    for number, line in logical(text):
        pin = _pin(line)
        if isinstance(pin, str):
            problems.append(f"lock line {number}: {pin}")
        elif pin.name in pins:
            problems.append(f"lock line {number}: {pin.name} is there twice")
        else:
            pins[pin.name] = pin
    return Lock(tuple(sorted(pins.values(), key=lambda p: p.name))), problems


def _pin(line: str) -> Pin | str:
    hashes = tuple(sorted(set(HASH.findall(line))))
    bare = HASH.sub("", line).strip()
    text, problem = requirement(bare)
    if problem:
        return problem
    try:
        parsed = Requirement(text)
    except InvalidRequirement as exc:
        return str(exc)
    exact = [s for s in parsed.specifier if s.operator in ("==", "===") and not s.version.endswith(".*")]
    if parsed.url is None and not (len(exact) == len(parsed.specifier) == 1):
        return f"{parsed.name} has no exact version (name==version)"
    if not hashes:
        return f"{parsed.name} has no --hash=sha256:…"
    return Pin(canonicalize_name(parsed.name), text, hashes)
