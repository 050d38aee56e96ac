"""Request bodies: JSON or YAML into plain values. Nothing is guessed, nothing is dropped.

A key given twice, NaN or infinity, a number beyond 64 bits, half a surrogate pair and nesting beyond ``DEPTH`` are
refused. YAML is read as YAML 1.2 core (``no`` is text) without anchors, aliases and tags: a document of a few bytes
cannot become a large one, and no type but JSON's comes out.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

from ..core.errors import Invalid

DEPTH = 64
JSON_TYPES = re.compile(r"^(application|text)/([a-z0-9.-]+\+)?json$")
YAML_TYPES = re.compile(r"^(application|text)/([a-z0-9.-]+\+)?(x-)?yaml$")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "True": True, "TRUE": True,
          "false": False, "False": False, "FALSE": False}


def malformed(why: str) -> Invalid:
    """400: the body cannot be read at all."""
    return Invalid(why, code="malformed")


def parse(raw: bytes, content_type: str) -> Any:
    """The value of a JSON or YAML body. Raises Invalid: 415 for another type, 400 for what cannot be read."""
    is_yaml = bool(YAML_TYPES.match(content_type))
    if not is_yaml and not JSON_TYPES.match(content_type):
        raise Invalid(f"a body of type '{content_type or 'none'}' is not read here", code="unsupported-media-type")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise malformed(f"the body is not UTF-8 (byte {exc.start})") from exc
    value = _yaml(text) if is_yaml else _json(text)
    _plain(value, 0)
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise malformed(f"the key '{twice}' is given twice in one object")
    return out


def _constant(word: str) -> Any:
    raise malformed(f"{word} is not JSON")


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except RecursionError as exc:
        raise malformed(f"the body is nested deeper than {DEPTH} levels") from exc
    except ValueError as exc:
        raise malformed(f"the body is not JSON: {exc}") from exc


def _plain(value: Any, depth: int) -> None:
    if depth > DEPTH:
        raise malformed(f"the body is nested deeper than {DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _text(key)
            _plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _plain(item, depth + 1)
    elif isinstance(value, str):
        _text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise malformed("the body holds a number that is not finite")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise malformed("the body holds an integer beyond 64 bits")


def _text(value: str) -> None:
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise malformed("the body holds text that is not Unicode (half a surrogate pair)")


class _Tree:
    """Builds plain values from YAML events, with a stack of its own: depth costs no recursion."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.keys: list[str | None] = []
        self.documents: list[Any] = []

    def add(self, value: Any, is_text: bool = True) -> None:
        if not self.stack:
            self.documents.append(value)
        elif isinstance(self.stack[-1], list):
            self.stack[-1].append(value)
        elif self.keys[-1] is None:
            if not is_text:
                raise malformed("a YAML key must be text; quote it")
            if value in self.stack[-1]:
                raise malformed(f"the key '{value}' is given twice in one object")
            self.keys[-1] = value
        else:
            self.stack[-1][self.keys[-1]] = value
            self.keys[-1] = None

    def open(self, value: Any) -> None:
        if self.stack and isinstance(self.stack[-1], dict) and self.keys[-1] is None:
            raise malformed("a YAML key must be text; quote it")
        if len(self.stack) >= DEPTH:
            raise malformed(f"the body is nested deeper than {DEPTH} levels")
        self.add(value)
        self.stack.append(value)
        self.keys.append(None)

    def close(self) -> None:
        self.stack.pop()
        self.keys.pop()

    def take(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise malformed("YAML anchors and aliases are not read here; write the value out")
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) not in (None, "!"):
            raise malformed(f"the YAML tag '{event.tag}' is not read here")  # type: ignore[attr-defined]
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event.value) if event.implicit[0] and not event.style else event.value
            self.add(value, isinstance(value, str))
        elif isinstance(event, yaml.MappingStartEvent):
            self.open({})
        elif isinstance(event, yaml.SequenceStartEvent):
            self.open([])
        elif isinstance(event, yaml.CollectionEndEvent):
            self.close()


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text) and len(text) < 30:
        return int(text)
    return float(text) if _FLOAT.match(text) else text


def _yaml(text: str) -> Any:
    tree = _Tree()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            tree.take(event)
    except yaml.YAMLError as exc:
        raise malformed(f"the body is not YAML: {' '.join(str(exc).split())}") from exc
    if len(tree.documents) != 1:
        raise malformed(f"one YAML document is needed, not {len(tree.documents)}")
    return tree.documents[0]
