"""Redaction: the named values are in nothing that is written, and everything else is still there."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.decode import inputs, outputs
from modelyard.core.inference import BINARY, JSON, PROTO, Inference, response_bytes, streamed, write_request
from modelyard.core.tensors import Tensor, to_raw
from modelyard.scoring.redaction import WITHHELD, Redactor
from modelyard.wire import inference_pb2 as pb
from tests.unit.test_capture_log import call, frames, opened

SECRET = "Ada-Lovelace-1815"
NUMBER = 7_355_608_911
MARKS = (SECRET.encode(), NUMBER.to_bytes(8, "little"), str(NUMBER).encode())
REDACTOR = Redactor(["customer", "account"])
WHO = Tensor("customer", np.array([SECRET.encode()], object), "BYTES")
ACCOUNT = Tensor("account", np.array([NUMBER], np.int64))
AGE = Tensor("age", np.array([[36.5]], np.float32))


def clean(*parts: bytes | str) -> bool:
    raw = b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)
    return not any(mark in raw for mark in MARKS)


@pytest.mark.parametrize("raw", [True, False])
def test_a_grpc_request_loses_the_named_tensors_only(raw: bool) -> None:
    asked = Inference("iris", "4", "r-1", {"customer": SECRET, "tier": "gold"}, [WHO, AGE, ACCOUNT], ("label",), raw)
    body = write_request(asked)
    assert not clean(body)
    kept, type_ = REDACTOR.request("grpc", body, PROTO)
    assert clean(kept) and type_ == PROTO
    assert inputs("grpc", kept, type_) == {"age": [[36.5]]}
    message = pb.ModelInferRequest.FromString(kept)
    assert (message.model_name, message.id, list(message.parameters)) == ("iris", "r-1", ["tier"])
    assert bool(message.raw_input_contents) is raw


@pytest.mark.parametrize("protocol", ["grpc", "stream"])
def test_an_answer_loses_the_named_tensors_only(protocol: str) -> None:
    body = response_bytes(Inference("iris", "4", "r-1", tensors=[AGE, WHO, ACCOUNT]))
    body = streamed(body) if protocol == "stream" else body
    kept, type_ = REDACTOR.response(protocol, "OK", body, PROTO)
    assert clean(kept) and outputs(protocol, kept, type_) == {"age": [[36.5]]}


def test_what_a_decoder_passes_over_is_not_kept() -> None:
    hidden = b"\xfa\x01" + bytes([len(SECRET)]) + SECRET.encode()  # a field that nobody knows
    body = write_request(Inference("iris", tensors=[AGE])) + hidden
    assert pb.ModelInferRequest.FromString(body) and not clean(body)
    assert clean(*REDACTOR.request("grpc", body, PROTO))


@pytest.mark.parametrize("body", [b"", b"\xff" * 40, SECRET.encode(), b'{"customer": "' + SECRET.encode(),
                                  write_request(Inference("iris", tensors=[WHO, ACCOUNT]))[:-3]])
@pytest.mark.parametrize(("protocol", "type_"), [
    ("grpc", PROTO), ("rest", JSON), ("score", JSON), ("score", "text/csv"), ("rest", f"{BINARY}; header-length=12")])
def test_what_cannot_be_read_is_not_kept(body: bytes, protocol: str, type_: str) -> None:
    kept, said = REDACTOR.request(protocol, body, type_)
    assert clean(kept) and (kept == b"" or protocol == "grpc")
    if body:
        assert said == type_ + WITHHELD


def test_a_v2_body_in_json_and_with_binary_data() -> None:
    entries: list[dict[str, Any]] = [
        {"name": "customer", "datatype": "BYTES", "shape": [1], "data": [SECRET]},
        {"name": "age", "datatype": "FP32", "shape": [1, 1], "data": [[36.5]], "parameters": {"account": NUMBER}},
        {"name": "account", "datatype": "INT64", "shape": [1], "data": [NUMBER]}]
    body = json.dumps({"id": "r-1", "customer": SECRET, "inputs": entries}).encode()
    kept, type_ = REDACTOR.request("rest", body, JSON)
    assert clean(kept) and inputs("rest", kept, type_) == {"age": [[36.5]]}
    raws = [to_raw(t) for t in (WHO, AGE, ACCOUNT)]
    for entry, raw in zip(entries, raws, strict=True):
        del entry["data"]
        entry["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": entries}).encode()
    kept, type_ = REDACTOR.request("rest", head + b"".join(raws), f"{BINARY}; header-length={len(head)}")
    assert clean(kept) and inputs("rest", kept, type_) == {"age": [[36.5]]}
    answer = json.dumps({"model_name": "iris", "outputs": [
        {"name": "account", "datatype": "INT64", "shape": [1], "data": [NUMBER]},
        {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["é", "b"]}]}).encode()
    kept, type_ = REDACTOR.response("rest", "OK", answer, JSON)
    assert clean(kept) and outputs("rest", kept, type_) == {"label": ["é", "b"]}


@pytest.mark.parametrize(("body", "rest"), [
    ({"customer": SECRET, "age": 3}, {"age": 3}),
    ({"data": [{"customer": SECRET, "age": 3}, {"age": 4, "deep": [{"account": [NUMBER]}]}]},
     {"data": [{"age": 3}, {"age": 4, "deep": [{}]}]}),
    ({"columns": ["customer", "age", "account"], "data": [[SECRET, 3, NUMBER], [SECRET, 4, NUMBER]]},
     {"columns": ["age"], "data": [[3], [4]]}),
    ({"input_data": {"columns": ["age", "account"], "index": [0], "data": [[3, NUMBER]]}},
     {"input_data": {"columns": ["age"], "index": [0], "data": [[3]]}}),
    ({"inputs": [{"name": "customer", "value": SECRET}, {"name": "age", "value": 3}]},
     {"inputs": [{"name": "customer"}, {"name": "age", "value": 3}]}),
])
def test_a_plain_json_body(body: dict[str, Any], rest: dict[str, Any]) -> None:
    kept, type_ = REDACTOR.request("score", json.dumps(body).encode(), JSON)
    assert json.loads(kept) == rest and type_ == JSON
    kept, type_ = REDACTOR.response("score", "OK", json.dumps(body).encode(), JSON)
    assert json.loads(kept) == rest and clean(kept)


@pytest.mark.parametrize("body", [
    {"columns": ["customer", "age"], "data": [[SECRET]]}, {"columns": ["customer"], "rows": [[SECRET]]},
    {"columns": ["account"], "data": {"0": NUMBER}}, {"a": {"columns": ["customer"], "data": SECRET}},
])
def test_a_table_that_cannot_be_told_apart_is_withheld(body: Any) -> None:
    assert REDACTOR.request("score", json.dumps(body).encode(), JSON) == (b"", JSON + WITHHELD)


def test_a_body_without_names_goes_by_its_default_name() -> None:
    assert Redactor(["data"]).request("score", b"[1, 2]", JSON) == (b"", JSON + WITHHELD)
    assert Redactor(["output-0"]).response("score", "OK", b"[1, 2]", JSON) == (b"", JSON + WITHHELD)
    assert json.loads(Redactor(["data"]).response("score", "OK", b"[1, 2]", JSON)[0]) == [1, 2]


def test_json_inside_a_tensor_is_cleaned() -> None:
    inside = json.dumps({"customer": SECRET, "age": 3}).encode()
    tensor = Tensor("body", np.array([inside], object), "BYTES", {"content_type": JSON})
    kept, type_ = REDACTOR.request("grpc", write_request(Inference("iris", tensors=[tensor])), PROTO)
    assert clean(kept) and inputs("grpc", kept, type_) == {"body": {"age": 3}}


def test_a_failures_body_is_withheld() -> None:
    said = json.dumps({"detail": f"'{SECRET}' is no number"}).encode()
    assert REDACTOR.response("rest", "INVALID_ARGUMENT", said, "application/problem+json") == \
        (b"", "application/problem+json" + WITHHELD)
    assert REDACTOR.response("grpc", "INTERNAL", b"", "") == (b"", "")


def test_nothing_of_the_values_is_in_the_spool(tmp_path: Path) -> None:
    """Everything that can carry them, recorded under every status; then the files are searched."""
    table = {"columns": ["customer", "age"], "data": [[SECRET, 3]]}
    bodies = [("grpc", PROTO, write_request(Inference("m", tensors=[WHO, AGE, ACCOUNT], raw=raw)))
              for raw in (True, False)]
    bodies += [("score", JSON, json.dumps(b).encode()) for b in (table, {"customer": SECRET}, [{"account": NUMBER}])]
    bodies += [("score", "text/plain", SECRET.encode()), ("grpc", PROTO, b"\xff" + SECRET.encode())]
    answer = response_bytes(Inference("m", tensors=[WHO, AGE]))
    with opened(tmp_path, redact=["customer", "account"]) as log:
        for status in ("OK", "INTERNAL"):
            for n, (protocol, type_, body) in enumerate(bodies):
                one = call(n, status, body)
                one.protocol, one.request_type = protocol, type_
                one.response_type = PROTO if protocol == "grpc" else JSON
                one.response = answer if protocol == "grpc" else body
                log.append([one])
        log.collect("features", "p1", ["customer", "age", "more"], [[SECRET, 3, {"account": NUMBER}]])
        log.collect("features", "p1", None, [[1, 2]])
        log.collect("features", "p1", ["customer"], [[1, SECRET]])
        found = frames(tmp_path)
        assert clean(*[p.read_bytes() for p in tmp_path.iterdir()])
        assert log.totals["recorded"] == 2 * len(bodies) and log.totals["rows-lost"] == 1
    rows = [f.body() for f in found if f.response == b"" and f.text()[-1] == "features"]
    assert rows == [{"columns": ["age", "more"], "rows": [[3, {}]]}, {"columns": ["c0", "c1"], "rows": [[1, 2]]}]
    assert clean(*[p.read_bytes() for p in tmp_path.iterdir()]), "the end frame too"


@pytest.mark.parametrize("raw", [True, False])
def test_no_damage_to_a_message_brings_the_values_back(raw: bool) -> None:
    """As long as the tensor still bears its name, whatever else became of the message."""
    body = write_request(Inference("iris", "4", "r-1", {"tier": "gold"}, [WHO, AGE], ("label",), raw))
    dice, readable = random.Random(1), 0
    for _ in range(4000):
        damaged = bytearray(body)
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(damaged))
            damaged[at:at + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
        kept, _ = REDACTOR.request("grpc", bytes(damaged), PROTO)
        readable += bool(kept)
        if not clean(kept):
            assert "customer" not in [tensor.name for tensor in pb.ModelInferRequest.FromString(bytes(damaged)).inputs]
    assert 100 < readable < 3900
