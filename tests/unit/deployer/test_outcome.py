"""From what a target shows to phases, conditions and events: pure steps, no I/O."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from modelyard.core.errors import Conflict, Invalid, NotFound
from modelyard.core.specs import DeploymentSpec
from modelyard.deployer.model import (
    Deployment,
    Found,
    deleting,
    requested,
    revised,
    rollback_to,
    values_of,
)
from modelyard.deployer.outcome import GONE_S, Seen, settled
from modelyard.ports.targets import Observed, Replica

NOW = datetime(2026, 11, 23, 14, 0, tzinfo=UTC)


def image(version: int = 1, phase: str = "ready", **more: Any) -> Found:
    return Found(id=f"scorer:{version}", name="scorer", phase=phase, models=[f"iris:{version}"],
                 digest=f"sha256:{version:064d}" if phase == "ready" else None, **more)


def values(version: int = 1, **changes: Any) -> dict[str, Any]:
    return values_of(DeploymentSpec.model_validate({"name": "iris", "image": f"scorer:{version}", **changes}))


def new(version: int = 1, phase: str = "ready", **changes: Any) -> Deployment:
    return requested(values(version, **changes), "iris", image(version, phase), workspace="default", now=NOW,
                     made_by=None, before=None)[0]


def shows(generation: int, ready: int, *, serving: int | None = None, **more: Any) -> Observed:
    serving = generation if serving is None else serving
    replicas = tuple(Replica(f"1-{n}", serving, True, 100 + n) for n in range(ready))
    return Observed("present", generation=generation, serving=serving, image="scorer:1" if serving else "",
                    replicas=replicas + more.pop("others", ()), ports={"grpc": 1, "rest": 2},
                    endpoints={"grpc": "127.0.0.1:1"}, **more)


def look(doc: Deployment, target: Observed, after_s: float = 1, **seen: Any) -> tuple[Deployment, list[str]]:
    """The document after a look, and the topics that were told."""
    doc, facts = settled(doc, Seen(doc.generation, target, **seen), NOW + timedelta(seconds=after_s))
    return doc, [fact.topic for fact in facts]


def condition(doc: Deployment, type_: str) -> tuple[str, str]:
    return next((c.status, c.reason) for c in doc.conditions if c.type == type_)


def healthy(**changes: Any) -> Deployment:
    doc, told = look(new(**changes), shows(1, changes.get("replicas", 1)))
    assert (doc.phase, told) == ("healthy", ["deployment.ready"])
    return doc


def change(doc: Deployment, version: int = 1, **changes: Any) -> Deployment:
    step = revised(doc, values(version, **changes), image(version), NOW)
    assert step is not None
    return step[0]


def test_a_new_deployment_waits_for_its_image() -> None:
    doc = new(phase="building")
    assert (doc.phase, doc.generation, doc.due, doc.holds) == ("pending", 1, NOW, {"scorer:1": "wanted"})
    doc, told = look(doc, Observed("absent"), image=image(1, "building"))
    assert (doc.phase, told, doc.observed_generation) == ("pending", [], 0)
    doc, told = look(doc, shows(1, 0, serving=0, candidate=1), image=image(1))
    assert (doc.phase, doc.image_digest, doc.history[0].digest) == ("progressing", image(1).digest, image(1).digest)


def test_an_image_that_failed_fails_the_deployment_once() -> None:
    bad = image(1, "failed", reason="score.py has no run")
    doc, told = look(new(phase="building"), Observed("absent"), image=bad)
    assert (doc.phase, told, doc.observed_generation) == ("failed", ["deployment.failed"], 1)
    assert condition(doc, "Progressing") == ("False", "ImageFailed") and "no run" in doc.conditions[-1].message + str(
        doc.history[0].reason)
    assert look(doc, Observed("absent"), image=bad)[1] == []


def test_ready_is_told_once_for_each_generation() -> None:
    doc = healthy()
    assert (doc.replicas_ready, doc.serving, doc.observed_generation, doc.ports) == (1, 1, 1, {"grpc": 1, "rest": 2})
    assert condition(doc, "Available") == ("True", "Serving") and doc.history[0].healthy
    assert look(doc, shows(1, 1))[1] == []
    doc = change(doc, description="second")
    assert look(doc, shows(1, 1))[0].phase == "progressing"
    doc, told = look(doc, shows(2, 1))
    assert (doc.phase, told, doc.observed_generation) == ("healthy", ["deployment.ready"], 2)


def test_a_candidate_that_fails_degrades_and_the_old_one_serves() -> None:
    doc = change(healthy(), 2)
    doc, told = look(doc, shows(2, 1, serving=1, failed="init() failed"))
    assert (doc.phase, told, doc.serving, doc.observed_generation) == ("degraded", ["deployment.failed"], 1, 2)
    assert condition(doc, "Progressing") == ("False", "GenerationFailed")
    assert condition(doc, "Available") == ("True", "Serving")
    assert doc.history[1].reason == "init() failed" and not doc.history[1].healthy
    assert look(doc, shows(2, 1, serving=1, failed="init() failed"))[1] == []
    fell, told = look(doc, shows(2, 0, serving=1, failed="init() failed"))
    assert (fell.phase, told) == ("failed", ["deployment.failed"]), "now nothing serves"


def test_a_first_generation_that_fails_is_failed() -> None:
    doc, told = look(new(), shows(1, 0, serving=0, failed="init() failed"))
    assert (doc.phase, told) == ("failed", ["deployment.failed"])


def test_the_target_refuses_and_later_does_not() -> None:
    doc, told = look(new(), Observed("absent"), trouble="port 8080 is in use")
    assert (doc.phase, told, condition(doc, "Progressing")) == ("failed", ["deployment.failed"], ("False", "Refused"))
    assert doc.due is not None and doc.due > NOW, "it is tried again"
    assert look(doc, shows(1, 1))[0].phase == "healthy"


def test_lost_replicas_degrade_and_fail_only_when_none_comes_back() -> None:
    doc = healthy(replicas=2)
    restarting = (Replica("1-1", 1, False, None, 1, "was ended by signal 9"),)
    one, told = look(doc, shows(1, 1, others=restarting))
    assert (one.phase, told, condition(one, "Progressing")) == ("degraded", [], ("True", "Complete"))
    none, told = look(one, shows(1, 0, others=restarting), 2)
    assert (none.phase, told, condition(none, "Available")) == ("degraded", [], ("False", "NoReplicaReady"))
    gone, told = look(none, shows(1, 0, others=restarting), 2 + GONE_S)
    assert (gone.phase, told) == ("failed", ["deployment.failed"])
    back, told = look(gone, shows(1, 2), 30)
    assert (back.phase, told) == ("healthy", [])


def test_never_available_without_a_ready_replica() -> None:
    for target in (Observed("absent"), shows(1, 0), shows(1, 0, serving=0, candidate=1)):
        assert condition(look(healthy(), target)[0], "Available")[0] == "False"


def test_scaling_up_that_takes_too_long_is_given_up_by_its_deadline() -> None:
    doc = change(healthy(progress_deadline_s=10), replicas=3, progress_deadline_s=10)
    assert look(doc, shows(2, 1), 5)[0].phase == "progressing"
    late, told = look(doc, shows(2, 1), 11)
    assert (late.phase, told) == ("degraded", ["deployment.failed"])
    assert condition(late, "Progressing") == ("False", "ProgressDeadlineExceeded")


def test_a_look_for_an_older_generation_only_notes_what_is_there() -> None:
    before = healthy()
    doc = change(before, 2)
    noted, facts = settled(doc, Seen(1, shows(1, 1), trouble="of yesterday", holds={"scorer:1": True}), NOW)
    assert (noted.phase, noted.replicas_ready, list(facts), noted.due) == ("progressing", 1, [], NOW)
    going = deleting(before, NOW)
    assert going is not None and settled(going[0], Seen(1, shows(1, 1)), NOW)[0].phase == "deleting"


def test_holds_follow_what_is_wanted_what_serves_and_what_was_good() -> None:
    doc, _ = look(new(), shows(1, 1), holds={"scorer:1": True})
    assert doc.holds == {"scorer:1": "placed"}
    doc = change(doc, 2)
    assert doc.holds == {"scorer:1": "placed", "scorer:2": "wanted"} and doc.needs() == {"scorer:1", "scorer:2"}
    doc, _ = look(doc, shows(2, 1, serving=1, failed="no"), holds={"scorer:2": True})
    doc = change(doc, 3)
    assert doc.needs() == {"scorer:1", "scorer:3"}, "what failed is not needed"
    doc, _ = look(doc, shows(3, 1, serving=1, candidate=3), holds={"scorer:2": False})
    assert set(doc.holds) == {"scorer:1", "scorer:3"}
    again, _ = look(change(doc, 2), shows(3, 1, serving=1), holds={"scorer:2": False})
    assert again.holds["scorer:2"] == "wanted", "given back while a caller asked for it again: placed anew"


def test_a_change_that_changes_nothing_is_none() -> None:
    doc = healthy()
    assert revised(doc, values(1), image(1), NOW) is None
    step = revised(doc, values(1), image(1), NOW, always=True)
    assert step is not None and step[0].generation == 2


def test_an_update_tells_what_it_was_before() -> None:
    step = revised(healthy(), values(2, replicas=3), image(2), NOW)
    assert step is not None
    doc, (fact,) = step
    assert (fact.topic, dict(fact.extra or {})) == ("deployment.updated", {
        "previous": {"image": "scorer:1", "replicas": 1}})
    assert (doc.generation, doc.models, doc.model_names) == (2, ["iris:2"], ["iris"])


def test_what_a_change_may_not_do() -> None:
    with pytest.raises(Invalid):
        revised(healthy(), {**values(), "target": "docker"}, image(), NOW)
    going = deleting(healthy(), NOW)
    assert going is not None and deleting(going[0], NOW) is None
    with pytest.raises(Conflict):
        revised(going[0], values(2), image(2), NOW)


def test_ten_generations_are_kept() -> None:
    doc = healthy()
    for n in range(2, 14):
        doc = change(doc, n)
    assert [p.generation for p in doc.history] == list(range(4, 14))
    with pytest.raises(NotFound) as caught:
        rollback_to(doc, 3)
    assert "4, 5, 6" in caught.value.message


def test_rollback_goes_to_the_last_good_one_that_is_not_this_one() -> None:
    doc = healthy()
    with pytest.raises(Conflict):
        rollback_to(doc, None)
    bad, _ = look(change(doc, 2), shows(2, 1, serving=1, failed="no"))
    assert rollback_to(bad, None).generation == 1
    good, _ = look(change(bad, 3), shows(3, 1))
    assert rollback_to(good, None).generation == 1 and rollback_to(good, 2).image == "scorer:2"


def test_a_generation_that_served_unseen_counts_as_good() -> None:
    doc = change(change(healthy(), 2), 3)
    doc, _ = look(doc, shows(3, 1, serving=2, candidate=3))
    assert [p.healthy for p in doc.history] == [True, True, False]


def test_created_again_its_events_are_counted_on() -> None:
    tomb = healthy().evolve(deleted=True, revision=17, sequence=5)
    doc, (fact,) = requested(values(), "iris", image(), workspace="default", now=NOW, made_by="key", before=tomb)
    assert (doc.generation, doc.revision, doc.sequence, doc.made_by, fact.topic) == (
        1, 17, 5, "key", "deployment.requested")


def test_what_this_release_does_not_do_is_said_at_once() -> None:
    with pytest.raises(Invalid) as caught:
        values_of(DeploymentSpec.model_validate({
            "name": "iris", "traffic": [{"image": "a-b:1", "weight": 1}, {"image": "a-b:2", "weight": 1}],
            "autoscale": {}}))
    assert {e["field"] for e in caught.value.detail["errors"]} == {"traffic", "autoscale"}
    one = values_of(DeploymentSpec.model_validate({"name": "iris", "traffic": [{"image": "a-b:1", "weight": 1}]}))
    assert (one["image"], one["replicas"]) == ("a-b:1", 1)
