"""The published language: every event version ever released still parses, and is what its schema says."""

import json
from pathlib import Path

import pytest

from modelyard.core.documents import Document
from modelyard.core.errors import Invalid
from modelyard.core.events import TOPICS, Envelope, Fact, announce, event_id

GOLDEN = sorted((Path(__file__).parent / "golden" / "events").glob("*.json"))
SCHEMAS = Path(__file__).parents[2] / "proto" / "events"


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_has_a_schema_and_a_sample(topic: str) -> None:
    assert (SCHEMAS / f"{topic}.v1.schema.json").is_file()
    assert any(p.name.startswith(f"{topic}.v1") for p in GOLDEN), f"no golden sample of {topic}.v1"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_sample_parses_and_is_what_its_schema_says(path: Path) -> None:
    import jsonschema  # takes seconds, and every worker reads every file

    raw = path.read_bytes()
    event = Envelope.decode(raw)
    schema = json.loads((SCHEMAS / f"{event.type}.schema.json").read_bytes())
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(raw))
    assert json.loads(event.encode()) == json.loads(raw)


class Thing(Document):
    kind = "thing"
    secret: str = "hidden"
    hidden = frozenset({"secret"})


def test_announce_counts_and_hides() -> None:
    doc, (first, second) = announce(Thing(id="t:1"), "registry", Fact("model.registered"),
                                    Fact("model.updated", {"previous": {"a": 1}}))
    assert doc.sequence == 2
    assert [first.sequence, second.sequence] == ["0" * 19 + "1", "0" * 19 + "2"]
    assert first.partitionkey == "default/t:1" and first.topic == "model.registered"
    assert set(first.data) == {"workspace", "id", "generation", "created", "updated"}
    assert second.data["previous"] == {"a": 1}


def test_capture_events_are_keyed_by_deployment() -> None:
    class Segment(Document):
        kind = "segment"
        deployment: str = "iris"

    _, (event,) = announce(Segment(id="0-ab-1", workspace="lab"), "telemetry", Fact("capture.closed"))
    assert event.partitionkey == "lab/iris" and event.subject == "0-ab-1"


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"[]", b"{}", b'{"specversion":"0.3"}', b"\xff\xfe"])
def test_what_is_not_an_event_is_invalid(raw: bytes) -> None:
    with pytest.raises(Invalid, match="not an event"):
        Envelope.decode(raw)


def test_unknown_attributes_are_kept() -> None:
    _, (event,) = announce(Thing(id="x"), "registry", Fact("model.deleted"))
    body = json.loads(event.encode()) | {"newattribute": "later"}
    assert json.loads(Envelope.decode(json.dumps(body).encode()).encode())["newattribute"] == "later"


def test_ids_sort_by_time() -> None:
    ids = [event_id() for _ in range(1000)]
    assert len(set(ids)) == 1000 and ids[0][:8] <= ids[-1][:8] and all(i[14] == "7" for i in ids)
