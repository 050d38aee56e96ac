"""What the capture policy promises, through a data plane with a real log: who is recorded, and that all are counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.segments import COUNTS, RECORD, START, Reader
from modelyard.core.tensors import Tensor
from modelyard.scoring import collect
from modelyard.scoring.capture import CaptureLog
from modelyard.scoring.dataplane import DataPlane
from tests.unit.scoring.planes import grpc_call, open_plane, rest_call, score_call
from tests.unit.scoring.test_joined_flavours import graph
from tests.unit.test_capture_log import until

SCORE = """
from modelyard.capture import Collector
seen = Collector("seen", columns=["age", "customer"])
def run(data):
    if data.get("bad"):
        raise ValueError(f"cannot score {data['customer']}")
    seen.collect([[data.get("age", 0), data["customer"]]])
    return {"label": 1, "customer": data["customer"]}
"""


@contextlib.asynccontextmanager
async def planned(
    folder: Path, score: str | None = SCORE, limits: dict[str, int] | None = None,
    models: Sequence[Mapping[str, Any]] = (), **policy: Any,
) -> AsyncIterator[tuple[DataPlane, CaptureLog]]:
    log = await asyncio.to_thread(CaptureLog.open, folder / "spool", "0-0a1b2c3d", {"image": "iris-scorer:7"},
                                  {"enabled": True, **policy})
    collect.bind(log)
    try:
        async with open_plane(folder, score, models, log=log, **limits or {}) as plane:
            yield plane, log
    finally:
        collect.bind(None)
        await asyncio.to_thread(log.close)


def spooled(folder: Path) -> list[Any]:
    return [f for p in sorted((folder / "spool").iterdir()) for f in Reader(p.read_bytes())]


def reasons(folder: Path) -> Counter[str]:
    """Every call of a closed log: recorded, or counted with its reason."""
    found: Counter[str] = Counter()
    for frame in spooled(folder):
        if frame.kind == RECORD:
            found["recorded"] += 1
        elif frame.kind == COUNTS:
            for *_, reason, _, n in frame.body()["counts"]:
                found[reason] += n
    return found


def by_key(kind: str, n: int, customer: int) -> Any:
    call = score_call({"customer": f"c{customer}", "age": n})
    if kind == "request_id":
        call.request_id = f"c{customer}"
    elif kind == "trace_id":
        call.trace_id = f"{customer:032x}"
    elif kind.startswith("header:"):
        call.key = f"c{customer}"
    return call


@pytest.mark.parametrize("key", ["input:customer", "request_id", "trace_id", "header:x-customer"])
async def test_calls_with_one_key_are_all_recorded_or_none(tmp_path: Path, key: str) -> None:
    async with planned(tmp_path, sampling=0.3, sampling_key=key) as (plane, _):
        assert plane.sampling_header == ("x-customer" if key.startswith("header:") else "")
        for n in range(8):
            answers = await plane.handle([by_key(key, n, customer) for customer in range(60)])
            assert {a.status for a in answers} == {"OK"}
    kept = Counter(json.loads(f.request)["customer"] for f in spooled(tmp_path) if f.kind == RECORD)
    assert set(kept.values()) == {8} and 5 <= len(kept) <= 35
    assert reasons(tmp_path) == {"recorded": 8 * len(kept), "sampled": 8 * (60 - len(kept))}
    rows = Counter(f.body()["rows"][0][1] for f in spooled(tmp_path) if f.text()[-1] == "seen")
    assert rows == kept, "what is collected follows its call"


VALUES = [n if n % 2 else n + 0.1 for n in range(40)]
FORMS: dict[str, Any] = {
    "raw, single precision": lambda n: grpc_call("flower", Tensor("customer", np.array([[n]], np.float32)), AGE),
    "typed, double precision": lambda n: grpc_call("flower", Tensor("customer", np.array([n])), AGE, raw=False),
    "v2": lambda n: rest_call("flower", {"inputs": [
        {"name": "customer", "datatype": "FP32", "shape": [1], "data": [n]},
        {"name": "age", "datatype": "FP64", "shape": [1], "data": [1.5]}]}),
    "a field": lambda n: score_call({"customer": n, "age": 2}),
    "a list": lambda n: score_call({"customer": [[n]]}),
    "a column": lambda n: score_call({"columns": ["age", "customer"], "data": [[2, n]]}),
    "rows of names": lambda n: score_call({"data": [{"age": 2, "customer": n}]}),
    "columns by name": lambda n: score_call({"data": {"customer": [n]}}),
}
AGE = Tensor("age", np.array([1.5]))


async def drawn(plane: DataPlane, log: CaptureLog, forms: dict[str, Any]) -> dict[str, set[float]]:
    """Which values are recorded, of calls of each form."""
    chosen: dict[str, set[float]] = {}
    for form, make in forms.items():
        for n in VALUES:
            before = log.totals["recorded"]
            assert (await plane.handle([make(n)]))[0].status == "OK"
            if log.totals["recorded"] > before:
                chosen.setdefault(form, set()).add(n)
    return chosen


@pytest.mark.parametrize("replica", [0, 1])
async def test_a_key_means_the_same_in_each_form_and_replica(tmp_path: Path, replica: int) -> None:
    async with planned(tmp_path, "def run(data):\n    return 1\n", sampling=0.5,
                       sampling_key="input:customer") as (plane, log):
        chosen = await drawn(plane, log, FORMS)
    first = chosen["a field"]
    assert chosen == dict.fromkeys(FORMS, first) and {3, 0.1} & first == CHOSEN, "the same in every process"
    assert 8 <= len(first) <= 32


CHOSEN = {3}
"""Of two values, by the hash of what stands for them."""


async def test_an_only_input_is_a_key_under_any_name(tmp_path: Path) -> None:
    model = graph(tmp_path / "m.onnx", [("Identity", ["x"], {})], {"x": ["n", 1]}, ["n", 1])
    forms = {name: lambda n, name=name: grpc_call("m", Tensor(name, np.array([[n]], np.float32))) for name in "xyz"}
    forms |= {"data": lambda n: score_call({"data": [[n]]}), "bare": lambda n: score_call([[n]])}
    async with planned(tmp_path, None, models=[model], sampling=0.5, sampling_key="input:x") as (plane, log):
        chosen = await drawn(plane, log, forms)
    assert chosen == dict.fromkeys(forms, chosen["x"]) and 8 <= len(chosen["x"]) <= 32


async def test_failures_are_recorded_whatever_their_key(tmp_path: Path) -> None:
    async with planned(tmp_path, sampling=0.0, sampling_key="input:customer") as (plane, _):
        await plane.handle([score_call({"customer": n, "bad": n % 3 == 0}) for n in range(30)])
    assert reasons(tmp_path) == {"recorded": 10, "sampled": 20}


async def test_redacted_values_are_nowhere_on_the_disk(tmp_path: Path) -> None:
    """In requests, answers, messages of errors, collected rows; while the segment is open and when it is closed."""
    secret = "Ada-Lovelace-1815"
    async with planned(tmp_path, redact=["customer"]) as (plane, log):
        answers = await plane.handle([
            score_call({"customer": secret, "age": 36}), score_call({"customer": secret, "bad": True}),
            grpc_call("flower", Tensor("customer", np.array([secret.encode()], object), "BYTES"),
                      Tensor("age", np.array([36]))),
            score_call(b'{"customer": "' + secret.encode())])
        assert [a.status for a in answers] == ["OK", "INTERNAL", "OK", "INVALID_ARGUMENT"]
        assert all(secret.encode() in a.body for a in answers[:3]), "the callers get theirs"
        assert log.totals["recorded"] == 4 and log.totals["collected"] == 2
        assert not any(secret.encode() in p.read_bytes() for p in (tmp_path / "spool").iterdir())
    assert not any(secret.encode() in p.read_bytes() for p in (tmp_path / "spool").iterdir())
    found = spooled(tmp_path)
    assert json.loads(next(f for f in found if f.kind == RECORD).request) == {"age": 36}
    assert [f.body() for f in found if f.text()[-1] == "seen"] == [
        {"columns": ["age"], "rows": [[36]]}, {"columns": ["age"], "rows": [[[36]]]}]


async def test_a_batch_is_one_write_and_one_sync_before_its_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted at the operating system's door; the log and its files are real."""
    seen: list[str] = []
    writev, fdatasync = os.writev, os.fdatasync
    monkeypatch.setattr(os, "writev", lambda fd, pieces: (seen.append("write"), writev(fd, pieces))[1])
    monkeypatch.setattr(os, "fdatasync", lambda fd: (seen.append("sync"), fdatasync(fd))[1])
    batch = "def run_batch(data):\n    return [0] * len(data['data'])\n"
    async with planned(tmp_path, batch, sync="always") as (plane, _):
        for _ in range(3):
            began = len(seen)
            for n in range(40):
                plane.submit(score_call({"data": [n]}), lambda answer: seen.append("reply"))
            await asyncio.to_thread(until, lambda began=began: seen[began:].count("reply") == 40)
            told = "".join(word[0] for word in seen[began:])
            groups = [group for group in told.split("ws") if group]
            assert told.count("r") == 40 and set("".join(groups)) == {"r"}, told
            assert told.startswith("ws") and len(groups) == told.count("w") < 40
    assert reasons(tmp_path) == {"recorded": 120}


async def test_messages_of_a_stream_are_written_by_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real connection: 300 messages, each a record of its own, and no more writes than batches."""
    import grpc

    from modelyard.scoring.transport_h2 import H2Transport

    writes = [0]
    writev = os.writev

    def counted(fd: int, pieces: Any) -> int:
        writes[0] += 1
        return writev(fd, pieces)

    batch = "import numpy as np\ndef run_batch(data: np.ndarray):\n    return data\n"
    async with planned(tmp_path, batch) as (plane, log):
        monkeypatch.setattr(os, "writev", counted)
        transport = H2Transport(f"unix:{tmp_path}/grpc", plane)
        await transport.start()
        try:
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/grpc") as channel:
                bodies = [grpc_call("flower", Tensor("x", np.array([n])), id=str(n)).body for n in range(300)]
                stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter(bodies))
                answers = [answer async for answer in stream]
        finally:
            await transport.stop(5)
        shown = (await asyncio.to_thread(plane.metrics.text)).decode()
        batches = sum(float(line.rpartition(" ")[2]) for line in shown.splitlines()
                      if line.startswith("modelyard_scoring_batch_calls_count"))
        begun = sum(frame.kind == START for frame in spooled(tmp_path))
        assert len(answers) == log.totals["recorded"] == 300
        assert writes[0] <= batches + begun < 300
    records = [f for f in spooled(tmp_path) if f.kind == RECORD]
    assert [f.request for f in records] == bodies, "message by message"


async def test_the_header_is_found_on_every_transport(tmp_path: Path) -> None:
    import aiohttp
    import grpc

    from modelyard.scoring.transport_direct import DirectTransport
    from modelyard.scoring.transport_grpc import GrpcTransport
    from modelyard.scoring.transport_h2 import H2Transport
    from modelyard.scoring.transport_rest import RestTransport

    chosen: dict[str, list[int]] = {}
    async with planned(tmp_path, sampling=0.5, sampling_key="header:x-customer") as (plane, log):
        served = {t: made(f"unix:{tmp_path}/{t}", plane)
                  for t, made in (("h2", H2Transport), ("grpc", GrpcTransport), ("rest", RestTransport),
                                  ("direct", DirectTransport))}
        body = score_call({"customer": 1}).body
        wire = grpc_call("flower", Tensor("customer", np.array([1])), Tensor("age", np.array([2]))).body

        async def call(transport: str, header: str) -> None:
            if transport in ("rest", "direct"):
                async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(f"{tmp_path}/{transport}")) as http, \
                        http.post("http://localhost/score", data=body, headers={"X-Customer": header}) as answer:
                    assert answer.status == 200
                return
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/{transport}") as channel:
                ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                await ask(wire, metadata=(("x-customer", header),))

        for transport in served.values():
            await transport.start()
        try:
            for name in served:
                for customer in range(24):
                    before = log.totals["recorded"]
                    await call(name, f"c{customer}")
                    if log.totals["recorded"] > before:
                        chosen.setdefault(name, []).append(customer)
        finally:
            for transport in served.values():
                await transport.stop(2)
    assert chosen["h2"] == chosen["grpc"] == chosen["rest"] == chosen["direct"] and 4 <= len(chosen["h2"]) <= 20


async def test_a_sync_that_fails_is_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fdatasync, fails = os.fdatasync, [False]

    def faulty(fd: int) -> None:
        if fails[0]:
            raise OSError(5, "the disk is gone")
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", faulty)
    async with planned(tmp_path, sync="always") as (plane, log):
        await plane.handle([score_call({"customer": 1})])
        fails[0] = True
        assert (await plane.handle([score_call({"customer": 2})]))[0].status == "OK"
        assert log.totals["write-failed"] == 1
        fails[0] = False
        await asyncio.to_thread(until, lambda: log._live is not None)
        await plane.handle([score_call({"customer": 3})])
    assert reasons(tmp_path) == {"recorded": 2, "write-failed": 1}
    assert [f.sequence for f in spooled(tmp_path) if f.kind == RECORD] == [1, 2]


@pytest.mark.parametrize("on_pressure", ["drop", "reject", pytest.param("block", marks=pytest.mark.slow)])
async def test_under_pressure_every_call_is_accounted_for(tmp_path: Path, on_pressure: str) -> None:
    """300 calls against a spool for fewer than a hundred: each is recorded or counted with the policy's reason."""
    room = tmp_path / "spool"

    async def make_room() -> None:
        while True:
            await asyncio.sleep(0.05)
            for path in room.glob("*.seg"):
                taken[path.name] = path.read_bytes()
                path.unlink()

    taken: dict[str, bytes] = {}
    async with planned(tmp_path, spool_bytes=64 * 1024, on_pressure=on_pressure,
                       limits={"max_queue": 1000}) as (plane, log):
        shipper = asyncio.create_task(make_room()) if on_pressure == "block" else None
        statuses: Counter[str] = Counter()
        for _ in range(30):
            answers = await plane.handle([score_call({"customer": "x" * 800}) for _ in range(10)])
            statuses.update(a.status for a in answers)
        if shipper is not None:
            shipper.cancel()
        totals, shown = log.totals, (await asyncio.to_thread(plane.metrics.text)).decode()
    recorded = totals["recorded"]
    for name, raw in taken.items():
        (room / name).write_bytes(raw)
    told = reasons(tmp_path)
    assert recorded == told["recorded"] >= 10
    if on_pressure == "drop":
        assert statuses == {"OK": 300} and told == {"recorded": recorded, "dropped": 300 - recorded}
    elif on_pressure == "reject":
        assert statuses == {"OK": recorded, "RESOURCE_EXHAUSTED": 300 - recorded}
        assert told == {"recorded": recorded, "pressed": 300 - recorded} and recorded < 300
    else:
        assert statuses == {"OK": 300} and told == {"recorded": 300}
        held = float(shown.partition('modelyard_scoring_capture{what="held"} ')[2].partition("\n")[0])
        assert held > 0
    assert f'modelyard_scoring_capture{{what="recorded"}} {float(recorded)}' in shown
