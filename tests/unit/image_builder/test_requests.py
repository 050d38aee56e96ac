"""What a POST refuses, what a name means, what can be changed."""

import asyncio
import sys

import pytest

from .conftest import SCORE, Yard


async def refused(yard: Yard, **spec: object) -> dict[str, str]:
    answer = await yard.call("POST", "/v1/images", spec)
    assert answer.status == 422, answer
    return {e["field"]: e["message"] for e in answer.json["errors"]}


async def test_all_problems_of_a_request_are_told_at_once(yard: Yard) -> None:
    told = await refused(
        yard, name="iris-scorer", models=["nobody:1"], score="sha256:" + "0" * 64, python="3.9",
        requirements=["scikit-learn==1.9.1", "not a requirement", "-r /etc/passwd", "x @ https://a:b@host/x.whl",
                      "y @ file:///etc/y.whl", "numpy>=1", "https://a:b@host/x.whl"],
        constraints=["numpy<3", "pandas[parquet]<3", "-c /etc/passwd", "x @ https://host/x.whl"])
    assert sorted(told) == ["constraints.1", "constraints.2", "constraints.3", "models.0", "python", "requirements.1",
                            "requirements.2", "requirements.3", "requirements.4", "requirements.6", "score"]
    assert "NAME @" in told["requirements.6"] and "a:b" not in str(told)
    assert "nobody:1" in told["models.0"] and "credentials" in told["requirements.3"]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in told["python"]
    assert (await yard.call("GET", "/v1/images")).json["items"] == []


async def test_nothing_to_serve_is_refused(yard: Yard) -> None:
    assert list(await refused(yard, name="empty")) == ["models"]


@pytest.mark.parametrize("name", ["ab", "Iris", "a..b", "-iris", "iris-", "a" * 33, "ir_is"])
async def test_bad_names(yard: Yard, name: str) -> None:
    assert list(await refused(yard, name=name, score="sha256:" + "0" * 64)) == ["name"]


async def test_unknown_fields_and_wrong_types(yard: Yard) -> None:
    assert sorted(await refused(yard, name="iris", colour="red", tags={"a": 1})) == ["colour", "tags.a"]


async def test_flavours_without_a_scoring_file(yard: Yard, onnx: bytes) -> None:
    pickle = b"\x80\x04N."
    custom = await yard.register("custom")
    unsafe = await yard.register("unsafe", pickle, framework="scikit-learn", filename="model.joblib")
    safe = await yard.register("safe", pickle, framework="scikit-learn", filename="model.joblib", trusted=True)
    graph = await yard.register("graph", onnx, framework="onnx", filename="model.onnx")
    told = await refused(yard, name="mixed", models=[custom, unsafe, safe, graph, "graph"])
    assert sorted(told) == ["models.0", "models.1", "models.4"]
    assert "score.py" in told["models.0"] and "trusted" in told["models.1"] and "already" in told["models.4"]


@pytest.mark.parametrize(("base", "told"), [
    ("python:3.11-slim", "docker.io/library/python"), ("python", "HOST/REPOSITORY"), ("", "HOST/REPOSITORY"),
    ("somebody:secret@docker.example/python:3.11", "docker login"), ("oci://a:b@docker.example/x", "docker login"),
    ("oci-layout://relative/x", "oci-layout:///FOLDER"), ("oci-layout:///", "oci-layout:///FOLDER"),
    ("oci-layout:///a/../b", "oci-layout:///FOLDER"), ("docker.example/Python:3.11", "HOST/REPOSITORY"),
    ("docker.example/python:3.11?token=x", "HOST/REPOSITORY"), ("https://docker.example/python", "HOST/REPOSITORY"),
])
async def test_a_base_that_is_no_reference(yard: Yard, base: str, told: str) -> None:
    found = await refused(yard, name="based", score=await yard.upload(SCORE), base=base)
    assert list(found) == ["base"] and told in found["base"] and "secret" not in found["base"]


async def test_a_lock_and_requirements_are_one_too_many(yard: Yard) -> None:
    score = await yard.upload(SCORE)
    both = await refused(yard, name="locked", score=score, lock=await yard.upload(b""), requirements=["numpy"])
    assert list(both) == ["lock"]


async def test_references_are_resolved_once(yard: Yard) -> None:
    await yard.register("iris", b"one")
    await yard.register("iris", b"two")
    first = await yard.small("first", models=["iris"])
    await yard.register("iris", b"three")
    again = (await yard.call("GET", "/v1/images/first")).json
    assert first["models"] == again["models"] == ["iris:2"]


async def test_versions_rise_and_the_bare_name_is_the_highest_ready_one(yard: Yard) -> None:
    one, two = await yard.small(), await yard.small()
    broken = await yard.small(score=await yard.upload(b"def walk(data): pass\n"))
    assert [one["id"], two["id"], broken["id"]] == ["tiny:1", "tiny:2", "tiny:3"]
    meant = await yard.call("GET", "/v1/images/tiny")
    assert meant.json["id"] == "tiny:2" and meant.headers["Content-Location"] == "/v1/images/tiny:2"
    assert (await yard.call("GET", "/v1/images/nobody")).status == 404
    assert (await yard.call("GET", "/v1/images/tiny@best")).status == 422


async def test_many_requests_for_one_name_get_one_version_each(yard: Yard) -> None:
    score, lock = await yard.upload(SCORE), await yard.upload(b"")
    docs = await asyncio.gather(
        *(yard.post(name="busy", score=score, lock=lock, tags={"nr": str(n)}) for n in range(12)))
    assert sorted(d["version"] for d in docs) == list(range(1, 13))
    done = [await yard.over(d["id"]) for d in docs]
    assert {d["phase"] for d in done} == {"ready"} and len({d["digest"] for d in done}) == 1


async def test_an_idempotency_key_makes_one_image(yard: Yard) -> None:
    spec = {"name": "once", "score": await yard.upload(SCORE), "lock": await yard.upload(b"")}
    answers = [await yard.call("POST", "/v1/images", spec, idempotency_key="k-1") for _ in range(2)]
    assert [a.status for a in answers] == [202, 202] and answers[0].json["id"] == answers[1].json["id"]
    assert len((await yard.call("GET", "/v1/images")).json["items"]) == 1


async def test_lists_filter_by_model_tag_and_name(yard: Yard) -> None:
    one, two = await yard.register("iris", b"1"), await yard.register("iris", b"2")
    await yard.small("first", models=[one], tags={"team": "flora", "stage": "dev"})
    await yard.small("second", models=[two], tags={"team": "flora"})

    async def ids(query: str) -> list[str]:
        answer = await yard.call("GET", f"/v1/images?{query}")
        assert answer.status == 200, answer
        return sorted(d["id"] for d in answer.json["items"])

    assert await ids("model=iris") == ["first:1", "second:1"]
    assert await ids("model=iris:2") == ["second:1"]
    assert await ids("tag=team=flora&tag=stage") == ["first:1"]
    assert await ids("name=second&phase=ready") == ["second:1"]
    digest = (await yard.call("GET", "/v1/images/second:1")).json["digest"]
    assert await ids(f"digest={digest}") == ["second:1"] and await ids(f"digest=sha256:{'0' * 64}") == []
    assert (await yard.call("GET", "/v1/images?digest=sha256:12")).status == 422
    assert (await yard.call("GET", "/v1/images?colour=red")).status == 422
    page = (await yard.call("GET", "/v1/images?limit=1")).json
    assert len(page["items"]) == 1 and page["next"]


async def test_what_can_be_changed(yard: Yard) -> None:
    await yard.small(tags={"a": "1", "b": "2"}, properties={"p": "1"})
    path = "/v1/images/tiny:1"
    new = await yard.call("PATCH", path, {"tags": {"a": None, "c": "3"}, "properties": {"q": "2"}})
    assert new.json["tags"] == {"b": "2", "c": "3"} and new.json["properties"] == {"p": "1", "q": "2"}
    assert new.json["generation"] == 2 and new.headers["ETag"] == '"2"'
    same = await yard.call("PATCH", path, {"tags": {"c": "3"}})
    assert same.json["generation"] == 2
    assert (await yard.call("PATCH", path, {"properties": {"p": "2"}})).status == 422
    assert (await yard.call("PATCH", path, {"score": "sha256:" + "0" * 64})).status == 422
    assert (await yard.call("PATCH", path, {"description": "x"}, if_match='"1"')).status == 412


async def test_trees_without_a_scoring_file(yard: Yard) -> None:
    pickle = b"\x80\x04N."
    unsafe = await yard.register("unsafe", pickle, framework="xgboost", filename="model.joblib")
    deep = await yard.register("deep", b"1", framework="tensorflow", filename="model.keras")
    program = await yard.register("program", b"1", framework="pytorch", filename="model.pt2")
    told = await refused(yard, name="trees", models=[unsafe, deep, program])
    assert "Booster.save_model" in told["models.0"] and "lightgbm and xgboost" in told["models.1"]
    assert "TorchScript" in told["models.2"] and "trusted" in told["models.2"]


def test_what_trees_need() -> None:
    from modelyard.image_builder import parts
    from modelyard.image_builder.model import ModelInput

    def needs(framework: str, filename: str) -> tuple[set[str], str]:
        place = parts.Place.of(ModelInput(name="m", version=1, artifact="sha256:0", framework=framework,
                                          filename=filename, trusted=True), False)
        return parts.NEEDS[place.kind], parts.PINS[place.kind].format("3.2")

    assert needs("lightgbm", "model.txt") == ({"lightgbm"}, "lightgbm>=3.2")
    assert needs("xgboost", "model.ubj") == ({"xgboost-cpu"}, "xgboost-cpu>=3.2")
    assert needs("xgboost", "model.pkl") == ({"xgboost-cpu", "scikit-learn"}, "xgboost-cpu==3.2")
    assert parts.once(["xgboost-cpu", "xgboost-cpu>=3", "XGBoost==3.2", "numpy"]) == {"XGBoost==3.2", "numpy"}
    assert parts.once(["xgboost-cpu>=3", "numpy"]) == {"xgboost-cpu>=3", "numpy"}
