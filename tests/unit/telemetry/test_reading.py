"""Captured calls are read back: as pages of decoded values, and as the raw rows for the SDK."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from modelyard.core.decode import decode, inputs, outputs
from modelyard.core.inference import BINARY, JSON, Inference, response_message, write_request
from modelyard.core.tensors import Tensor
from modelyard.telemetry.parquet import SCHEMA
from tests.unit.telemetry.bench import NOON, Bench, Life, bench

ARROW = "application/vnd.apache.arrow.stream"
FLOWER = Tensor("x", np.array([[5.0, 3.5]], np.float32))
ASK = write_request(Inference("iris", tensors=[FLOWER]))
ANSWER = response_message(Inference("iris", tensors=[Tensor("label", np.array([2]))])).SerializeToString()


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as opened:
        await opened.deployed()
        yield opened


async def fill(here: Bench) -> None:
    """30 calls of two processes, ten a segment, a second apart."""
    one, other = Life("0-aaaaaaaa"), Life("1-bbbbbbbb")
    for n in range(3):
        life = (one, other, one)[n]
        for k in range(10):
            life.record(NOON + timedelta(seconds=n * 10 + k), request=ASK, response=ANSWER)
        await here.ship(life)
    here.clock.tick(minutes=1)
    await here.step()


async def read(here: Bench, query: str) -> pa.Table:
    status, body = await here.get(f"/v1/capture/iris{query}", Accept=ARROW)
    assert status == 200, body
    return pa.ipc.open_stream(body).read_all()


async def test_a_page_holds_decoded_calls(here: Bench) -> None:
    await fill(here)
    status, page = await here.get("/v1/capture/iris?limit=1")
    assert status == 200 and page["next"]
    (row,) = page["items"]
    assert row["time"] == "2026-11-23T12:00:29.000000Z" and row["replica"] == "0-aaaaaaaa" and row["sequence"] == 20
    assert row["inputs"] == {"x": [[5.0, 3.5]]} and row["outputs"] == {"label": [2]}
    assert "request" not in row and "response" not in row


@pytest.mark.parametrize("order", ["time", "-time"])
@pytest.mark.parametrize("limit", [1, 7, 10, 1000])
async def test_pages_miss_and_repeat_nothing(here: Bench, order: str, limit: int) -> None:
    await fill(here)
    seen: list[str] = []
    after = ""
    while True:
        status, page = await here.get(f"/v1/capture/iris?order={order}&limit={limit}{after}")
        assert status == 200, page
        seen += [row["time"] for row in page["items"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert len(seen) == 30 and seen == sorted(seen, reverse=order == "-time")


async def test_a_stretch_of_time(here: Bench) -> None:
    await fill(here)
    stretch = "?start=2026-11-23T12:00:05Z&end=2026-11-23T12:00:15Z"
    status, page = await here.get(f"/v1/capture/iris{stretch}")
    assert status == 200 and len(page["items"]) == 10 and page["next"] is None
    table = await read(here, stretch)
    assert table.num_rows == 10 and table.schema == SCHEMA


async def test_the_sdk_reads_everything_or_the_newest(here: Bench) -> None:
    await fill(here)
    table = await read(here, "")
    assert table.num_rows == 30 and table.schema == SCHEMA
    assert table.column("request").to_pylist() == [ASK] * 30
    newest = await read(here, "?limit=12")
    assert newest.column("time").to_pylist() == table.column("time").to_pylist()[-12:]
    nothing = await read(here, "?start=2027-01-01")
    assert nothing.num_rows == 0 and nothing.schema == SCHEMA


async def test_collectors_whose_columns_changed_are_read_as_one(here: Bench) -> None:
    life = Life().record(NOON).collect(NOON, "features", ["a"], [[1]])
    await here.ship(life)
    await here.ship(life.record(NOON).collect(NOON, "features", ["a", "b"], [[2.5, "x"]]))
    await here.step()
    table = await read(here, "?collect=features")
    assert table.column("a").to_pylist() == [1.0, 2.5] and table.column("b").to_pylist() == [None, "x"]
    assert (await read(here, "?collect=nothing")).num_rows == 0


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=status", "after=abc", "collect=../x", "start=1",
                                   "unknown=1"])
async def test_bad_questions(here: Bench, query: str) -> None:
    assert (await here.get(f"/v1/capture/iris?{query}"))[0] == 422


async def test_every_protocol_decodes_by_name() -> None:
    v2 = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [5.0, 3.5]}]}'
    head = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}]}'
    raw = head + np.array([5.0, 3.5], np.float32).tobytes()
    for protocol, body, type_ in (("grpc", ASK, "application/grpc+proto"), ("rest", v2, JSON),
                                  ("rest", raw, f"{BINARY}; header-length={len(head)}")):
        assert inputs(protocol, body, type_) == {"x": [[5.0, 3.5]]}
    assert inputs("score", b'[[1, 2]]', JSON) == {"data": [[1, 2]]}
    assert outputs("score", b'{"a": 1, "b": [2]}', JSON) == {"a": 1, "b": [2]}
    boxed = Tensor("output-0", np.array([b'{"label": "setosa"}'], object), "BYTES", {"content_type": JSON})
    wire = response_message(Inference("iris", tensors=[boxed])).SerializeToString()
    assert outputs("grpc", wire, "application/grpc+proto") == {"output-0": {"label": "setosa"}}
    texts = Tensor("names", np.array([b"a", b"\xff"], object), "BYTES")
    wire = write_request(Inference("iris", tensors=[texts]))
    assert inputs("grpc", wire, "application/grpc+proto") == {"names": ["a", "\ufffd"]}


@pytest.mark.parametrize(("protocol", "body", "type_"), [
    ("grpc", b"\xff\xff", "application/grpc+proto"), ("rest", b"{", JSON), ("rest", b'{"inputs": 3}', JSON),
    ("rest", b"{}", f"{BINARY}; header-length=x"), ("score", b"", JSON), ("score", b"a", "text/plain")])
def test_what_cannot_be_decoded_has_no_names(protocol: str, body: bytes, type_: str) -> None:
    assert inputs(protocol, body, type_) == {} == outputs(protocol, body, type_)


def test_a_table_gets_a_column_for_each_name() -> None:
    rows = {name: [None, None, None] for name in SCHEMA.names} | {
        "protocol": ["grpc", "score", "score"], "status": ["OK", "OK", "INTERNAL"],
        "request": [ASK, b'{"x": [[1.0, 2.0]], "y": 1}', b'{"y": "mixed"}'],
        "response": [ANSWER, b'["a"]', b'{"error": "no"}'],
        "request_type": ["application/grpc+proto", JSON, JSON], "response_type": ["application/grpc+proto", JSON, JSON]}
    table = decode(pa.table(rows, schema=SCHEMA))
    assert table.num_rows == 3 and "request" not in table.column_names and "prediction_id" in table.column_names
    assert table.column("inputs.x").to_pylist() == [[[5.0, 3.5]], [[1.0, 2.0]], None]
    assert table.column("inputs.y").to_pylist() == [None, "1", '"mixed"']
    assert table.column("outputs.label").to_pylist() == [[2], None, None]
    assert table.column("outputs.output-0").to_pylist() == [None, ["a"], None]
    assert "outputs.error" not in table.column_names
