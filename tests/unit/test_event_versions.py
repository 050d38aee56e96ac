"""Rolling upgrade: an older service reads a newer one's events, and the reverse, for every event ever released.

``golden/events`` are samples, ``golden/schemas`` the schemas as they were released: within a version only optional
fields are added. Whoever releases copies ``proto/events`` there; what is there never changes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.events import TOPICS, Envelope
from modelyard.core.schemas import event_schema

HERE = Path(__file__).parent / "golden"
SAMPLES = sorted((HERE / "events").glob("*.json"))
RELEASED = sorted((HERE / "schemas").glob("*.json"))


def broken(old: Any, new: Any, at: str = "") -> list[str]:
    """What a consumer may have relied on in ``old`` that ``new`` no longer promises, or demands in addition."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{at}: {old!r} became {new!r}"]
    out = []
    for word in ("type", "format", "anyOf", "pattern", "const"):
        if word in old and old[word] != new.get(word):
            out.append(f"{at}: {word} {old[word]!r} became {new.get(word)!r}")
    if "enum" in old and not set(new.get("enum", ())) <= set(old["enum"]):
        out.append(f"{at}: values that old readers do not know: {sorted(set(new.get('enum', ())) - set(old['enum']))}")
    if lost := set(old.get("required", ())) - set(new.get("required", ())):
        out.append(f"{at}: no longer always there: {sorted(lost)}")
    if more := set(new.get("required", ())) - set(old.get("required", ())):
        out.append(f"{at}: newly required, which old events lack: {sorted(more)}")
    for name, schema in old.get("properties", {}).items():
        if name not in new.get("properties", {}):
            out.append(f"{at}.{name}: is gone")
        else:
            out += broken(schema, new["properties"][name], f"{at}.{name}")
    if "items" in old:
        out += broken(old["items"], new.get("items"), f"{at}[]")
    for name, schema in old.get("$defs", {}).items():
        out += broken(schema, new.get("$defs", {}).get(name), f"{at}#{name}")
    return out


def newer(value: Any) -> Any:
    """As a later version of the same event may look: a field more in every object that is not a caller's own map."""
    if isinstance(value, list):
        return [newer(v) for v in value]
    if not isinstance(value, dict):
        return value
    maps = ("tags", "properties", "env", "errors", "aliases", "previous", "labels")
    return {**{k: v if k in maps else newer(v) for k, v in value.items()}, "addedlater": {"by": ["N"]}}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_an_older_reader_takes_a_newer_event(path: Path) -> None:
    old = json.loads(path.read_bytes())
    body = {**old, "data": newer(old["data"]), "addedlater": "N"}
    event = Envelope.decode(json.dumps(body).encode())
    assert (event.id, event.sequence, event.partitionkey) == (old["id"], old["sequence"], old["partitionkey"])
    assert all(event.data[field] is not None or old["data"][field] is None for field in old["data"])
    assert json.loads(event.encode()) == body, "what is passed on keeps what is not known"


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_the_schema_lets_a_newer_event_through(path: Path) -> None:
    import jsonschema  # takes seconds, and every worker reads every file

    body = json.loads(path.read_bytes())
    schema = event_schema(body["type"].removesuffix(".v1"))
    body["data"]["addedlater"] = 1
    jsonschema.Draft202012Validator(schema).validate(body)


def test_every_topic_has_its_released_schema() -> None:
    assert {p.name.removesuffix(".v1.schema.json") for p in RELEASED} == set(TOPICS)


@pytest.mark.parametrize("path", RELEASED, ids=lambda p: p.name.removesuffix(".schema.json"))
def test_nothing_released_is_taken_back(path: Path) -> None:
    topic = path.name.removesuffix(".v1.schema.json")
    assert broken(json.loads(path.read_bytes()), json.loads(json.dumps(event_schema(topic)))) == []


def _drop(schema: Any) -> None:
    del schema["properties"]["data"]["properties"]["created"]


def _retype(schema: Any) -> None:
    schema["properties"]["data"]["properties"]["id"] = {"type": "integer"}


def _rename(schema: Any) -> None:
    properties = schema["properties"]["data"]["properties"]
    properties["made"] = properties.pop("created")


def _demand(schema: Any) -> None:
    schema["properties"]["data"]["properties"]["more"] = {"type": "string"}
    schema["properties"]["data"]["required"] = [*schema["properties"]["data"]["required"], "more"]


def _promise_less(schema: Any) -> None:
    schema["properties"]["data"]["required"].remove("id")


@pytest.mark.parametrize("change", [_drop, _retype, _rename, _demand, _promise_less])
@pytest.mark.parametrize("topic", TOPICS)
def test_a_breaking_change_is_noticed(topic: str, change: Any) -> None:
    old = json.loads(json.dumps(event_schema(topic)))
    new = copy.deepcopy(old)
    change(new)
    assert broken(old, new)


@pytest.mark.parametrize("topic", TOPICS)
def test_an_optional_field_more_is_none(topic: str) -> None:
    old = json.loads(json.dumps(event_schema(topic)))
    new = copy.deepcopy(old)
    new["properties"]["data"]["properties"]["more"] = {"type": "string"}
    assert broken(old, new) == []
