"""Rolling upgrade: an older service reads a newer one's documents, changes them, and writes back all that it does not
know, at every depth. Callers' unknown fields are refused as ever."""

from __future__ import annotations

import importlib
import json
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from modelyard.core.documents import Document, Part, carried
from modelyard.core.errors import Invalid
from modelyard.core.specs import (
    Capture,
    Condition,
    Dataset,
    DeploymentSpec,
    ImageSpec,
    Limits,
    ModelSpec,
    Resources,
    Secret,
)
from modelyard.deployer.api import _values_of
from modelyard.deployer.converge import workload
from modelyard.deployer.model import Deployment, Found, requested, revised, rollback_to, values_of
from modelyard.image_builder.model import Image, ModelInput, building
from modelyard.image_builder.model import requested as image_requested
from modelyard.kernel.call import check
from modelyard.kernel.dead import DeadLetter, ParkedKey, Raw
from modelyard.node import ROOMS
from modelyard.registry.claims import Seen
from modelyard.registry.model import Model, made, patched
from modelyard.telemetry.model import File, Life, Segment

NOW = datetime(2026, 11, 23, 14, 5, 6, 7, tzinfo=UTC)
DIGEST = "sha256:" + "0" * 64
MAPS = ("tags", "properties", "env", "holds", "ports", "endpoints", "not_recorded", "signature", "signatures",
        "samples", "served_as")
"""Fields that are callers' or our own maps of names, not objects with fields."""
BY_NAME = ("secrets",)
NEWER = {"by": ["N"], "text": "kept"}
DEPLOYMENT = {"name": "iris", "image": "scorer:1", "capture": {"enabled": True}, "resources": {"memory": "1Gi"},
              "secrets": {"DB": {"env": "DB_PASSWORD"}}}
IMAGE = Found(id="scorer:1", name="scorer", phase="ready", digest=DIGEST, models=["iris:1"])
RAW = Raw(topic="model.registered", key="default/iris:1", origin="0/1", text="{}")


def deployment() -> Deployment:
    return requested(values_of(DeploymentSpec.model_validate(DEPLOYMENT)), "iris", IMAGE, workspace="default",
                     now=NOW, made_by=None, before=None)[0]


def model() -> Model:
    spec = ModelSpec(name="iris", artifact=DIGEST, datasets=[Dataset(name="a"), Dataset(name="b", uri="https://e/b")])
    return made(spec, 1, workspace="default", size=7, seen=Seen("custom"), parent=None, made_by=None, now=NOW)


def image() -> Image:
    return image_requested(ImageSpec(name="scorer", models=["iris"]), [ModelInput(
        name="iris", version=1, artifact=DIGEST)], workspace="default", version=1, python=None,
        platform="linux/amd64", now=NOW, made_by=None)


def samples() -> list[Document]:
    letter = DeadLetter(id="x", group="registry", topic=RAW.topic, key=RAW.key, event=RAW, attempts_made=1, error="e",
                        message="m", first_failed=NOW, last_failed=NOW)
    segment = Segment(id="iris:0:1", deployment="iris", image="scorer:1", replica="0", number=1, begin=NOW, end=NOW,
                      files=[File(key="k", rows=1, bytes=2, first=1, last=1)], life=Life(models=["iris:1"]))
    return [deployment(), model(), image(), letter, segment,
            ParkedKey(id="k", topic=RAW.topic, key=RAW.key, events=[RAW, RAW], error="e")]


def newer(value: Any, field: str = "") -> Any:
    """As a later version may write the same: a field more in every object."""
    if isinstance(value, list):
        return [newer(item) for item in value]
    if not isinstance(value, dict) or field in MAPS:
        return value
    inside = {key: newer(item, key) for key, item in value.items()}
    return inside if field in BY_NAME else {**inside, "addedlater": NEWER}


def by_n(doc: Document) -> Any:
    """The document as an older service reads what N wrote."""
    return type(doc).restored(json.dumps(newer(json.loads(doc.model_dump_json()))))


def stored(doc: Document) -> Any:
    return json.loads(doc.model_dump_json())


@pytest.mark.parametrize("doc", samples(), ids=lambda doc: doc.kind)
def test_what_is_written_back_is_what_was_read(doc: Document) -> None:
    read = by_n(doc)
    assert stored(read) == newer(stored(doc)) != stored(doc)
    assert stored(read.evolve(updated=NOW, lease="a")) == {**newer(stored(doc)), "updated": stored(read.evolve(
        updated=NOW))["updated"], "lease": "a"}
    assert read.view() == doc.view(), "and it is shown to nobody"


def everything() -> set[type[Document]]:
    for room in ROOMS.values():
        importlib.import_module(room, "modelyard")
    found, left = set(), [Document]
    while left:
        kind = left.pop()
        found.add(kind)
        left += kind.__subclasses__()
    return {kind for kind in found if kind.__module__.startswith("modelyard.")}


def parts(annotation: Any) -> set[type[BaseModel]]:
    """The models that a field may hold, and those inside of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}.union(*(parts(field.annotation) for field in annotation.model_fields.values()))
    return set().union(*map(parts, get_args(annotation)))


def test_every_part_of_every_document_keeps_what_it_does_not_know() -> None:
    inside = set().union(*(parts(f.annotation) for kind in everything() for f in kind.model_fields.values()))
    assert {Condition, Capture, Raw, File} <= inside
    assert [part for part in inside if not issubclass(part, Part) or part.model_config.get("extra") != "allow"] == []


def test_a_callers_change_carries_on_what_he_cannot_know() -> None:
    read = by_n(deployment())
    same = values_of(DeploymentSpec.model_validate(DEPLOYMENT))
    assert revised(read, same, IMAGE, NOW) is None, "what he does not know is no difference"
    changed = values_of(DeploymentSpec.model_validate({**DEPLOYMENT, "capture": {"enabled": True, "sampling": 0.5}}))
    step = revised(read, changed, IMAGE, NOW)
    assert step is not None
    (fact,) = step[1]
    assert fact.extra == {"previous": {"capture": deployment().view()["capture"]}}
    body = stored(step[0])
    assert body["capture"] == {**newer(stored(deployment()))["capture"], "sampling": 0.5}
    assert all(body[part]["addedlater"] == NEWER for part in ("limits", "resources"))
    assert body["secrets"]["DB"]["addedlater"] == NEWER
    assert body["history"][0] == newer(stored(deployment()))["history"][0]
    assert body["history"][1]["spec"]["capture"] == body["capture"]


def test_a_roll_back_brings_back_what_that_generation_had() -> None:
    first = by_n(deployment())
    past = first.history[0].model_copy(update={"healthy": True})
    second = first.evolve(generation=2, addedlater="changed by N", history=[past, past.model_copy(update={
        "generation": 2, "spec": {**past.spec, "addedlater": "changed by N"}})])
    assert second.history[0].spec["addedlater"] == NEWER
    step = revised(second, _values_of(rollback_to(second, 1)), IMAGE, NOW, always=True)
    assert step is not None
    body = stored(step[0])
    assert (body["addedlater"], body["capture"]["addedlater"]) == (NEWER, NEWER)
    assert body["history"][-1]["spec"] == body["history"][0]["spec"]


def test_a_target_is_told_what_this_version_knows() -> None:
    told = workload(by_n(deployment()), DIGEST, "grant")
    assert told == workload(deployment(), DIGEST, "grant")


def test_a_patched_model_keeps_what_its_datasets_had() -> None:
    read = by_n(model())
    view = read.view()
    wanted = check(ModelSpec, {**{name: view[name] for name in ModelSpec.model_fields}, "tags": {"a": "b"}})
    change = patched(read, wanted, NOW)
    assert change is not None and change[1] == {"tags": {}}
    assert stored(change[0])["datasets"] == newer(stored(model()))["datasets"]
    assert patched(read, check(ModelSpec, {name: view[name] for name in ModelSpec.model_fields}), NOW) is None


def test_a_build_that_begins_keeps_what_its_inputs_had() -> None:
    step = building(by_n(image()), NOW)
    assert step is not None and stored(step[0])["inputs"] == newer(stored(image()))["inputs"]


def test_items_of_a_list_are_known_by_what_they_say() -> None:
    a, b = Dataset(name="a"), Dataset(name="b")
    old = [a.model_copy(update={"more": 1}), b.model_copy(update={"more": 2})]
    assert [d.model_extra for d in carried(old, [b, Dataset(name="c"), a])] == [{"more": 2}, {}, {"more": 1}]


@pytest.mark.parametrize("part", [Capture, Dataset, Limits, Resources, Secret])
def test_the_schema_of_what_callers_write_lets_nothing_unknown_in(part: type[BaseModel]) -> None:
    assert part.model_json_schema()["additionalProperties"] is False


@pytest.mark.parametrize("where", ["", "capture", "limits", "resources", "secrets.DB"])
def test_callers_unknown_fields_are_refused(where: str) -> None:
    body = json.loads(json.dumps({**DEPLOYMENT, "limits": {}}))
    at = body
    for step in filter(None, where.split(".")):
        at = at[step]
    at["addedlater"] = 1
    with pytest.raises(Invalid) as refused:
        check(DeploymentSpec, body)
    assert refused.value.detail["errors"] == [{
        "field": f"{where}.addedlater".lstrip("."), "message": "Extra inputs are not permitted"}]
    with pytest.raises(ValidationError):
        DeploymentSpec.model_validate(body, extra="forbid")
