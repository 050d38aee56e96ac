"""The scoring client against a real server of each transport: unary calls, and many over streams."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard import AsyncScoringClient, ScoringClient
from modelyard.client import Tls
from modelyard.core.errors import Invalid, ModelyardError, NotFound, Unavailable
from modelyard.core.tensors import DATATYPES
from tests.contract.test_transport_tls import certificates
from tests.unit.client.servers import ran, serving
from tests.unit.scoring.roots import Replica, free_ports, launch, make_root


@pytest.fixture(scope="module", params=["h2", "grpc"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with serving(tmp_path_factory.mktemp("echo"), request.param) as replica:
        yield replica


@pytest.fixture
def scorer(server: Replica) -> Iterator[ScoringClient]:
    with ScoringClient(server.grpc, model="echo", timeout_s=20) as client:
        yield client


def numbers(count: int, start: int = 0) -> Iterator[dict[str, Any]]:
    for n in range(start, start + count):
        yield {"n": np.array([n]), "x": np.full((1 + n % 7, 3), n, np.float32)}


def values(results: Any) -> list[Any]:
    return [r if isinstance(r, ModelyardError) else int(r["n"][0]) for r in results]


def every_datatype() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    made: dict[str, Any] = {
        name: rng.integers(0, 2 if name == "BOOL" else 100, (2, 3)).astype(dtype)
        for dtype, name in DATATYPES.items() if name != "BYTES"}
    made["empty"] = np.empty((0, 4), np.float32)
    made["scalar"] = np.array(7.5)
    made["bytes"] = np.array([[b"", b"\xff\x00"], ["é".encode(), b"x" * 300]], object)
    made["turned"] = np.arange(6, dtype=np.int32).reshape(2, 3).T
    made["big-endian"] = np.arange(4, dtype=">i8")
    return made


def same(sent: dict[str, Any], got: Any) -> None:
    assert set(got) == {*sent, "pid"}
    for name, array in sent.items():
        assert got[name].shape == array.shape and np.array_equal(got[name], array), name
        assert got[name].dtype == array.dtype.newbyteorder("="), name


def test_every_datatype_goes_and_comes_back(scorer: ScoringClient) -> None:
    sent = every_datatype()
    same(sent, scorer.infer(sent))
    for got in scorer.infer_many([sent] * 3):
        same(sent, got)


def test_json_comes_as_what_it_holds(tmp_path: Path) -> None:
    root = make_root(tmp_path, "def run(data):\n    return {'got': data}\n")
    with launch(root, deployment="free") as server, ScoringClient(server.grpc, model="free") as client:
        for given in ('{"any": ["thing", null]}', b'{"any": ["thing", null]}'):
            answers = [client.infer(given), *client.infer_many([given])]
            assert [a["output-0"].tolist() for a in answers] == [[{"got": {"any": ["thing", None]}}]] * 2  # type: ignore[index]


def test_what_the_model_says_and_what_is_asked_for(scorer: ScoringClient) -> None:
    assert scorer.model_ready()
    assert scorer.model_metadata()["name"] == "echo"
    assert scorer.infer([[1.5, 2.5]])["input-0"].tolist() == [[1.5, 2.5]]
    assert set(scorer.infer({"n": np.array([1]), "x": np.ones(2)}, outputs=["x"])) == {"x"}
    assert [set(r) for r in scorer.infer_many(numbers(2), outputs=["n"])] == [{"n"}] * 2


@pytest.mark.parametrize("in_flight", [1, 7, 128])
def test_results_come_in_order(scorer: ScoringClient, in_flight: int) -> None:
    assert values(scorer.infer_many(numbers(300), in_flight=in_flight, request_id="order")) == list(range(300))
    assert list(scorer.infer_many([])) == []


async def test_results_come_in_order_async(server: Replica) -> None:
    async def source() -> AsyncIterator[Any]:
        for item in numbers(200):
            await asyncio.sleep(0)
            yield item

    async with AsyncScoringClient(server.grpc, model="echo", connections=3) as client:
        assert values([r async for r in client.infer_many(source(), in_flight=9)]) == list(range(200))
        assert values([r async for r in client.infer_many(numbers(200))]) == list(range(200))
        assert values(await asyncio.gather(*(client.infer(i) for i in numbers(40)))) == list(range(40))


async def test_a_result_does_not_wait_for_the_next_item(server: Replica) -> None:
    answered = asyncio.Event()

    async def source() -> AsyncIterator[Any]:
        for item in numbers(3):
            answered.clear()
            yield item
            await asyncio.wait_for(answered.wait(), 20)

    async with AsyncScoringClient(server.grpc, model="echo") as client:
        async for _ in client.infer_many(source()):
            answered.set()


def test_a_failure_belongs_to_its_item(scorer: ScoringClient) -> None:
    items = list(numbers(20))
    items[3] = {"fail": np.array([3])}
    items[5] = {"x": np.array([1j])}  # has no datatype: never sent
    items[7] = {}
    got = values(scorer.infer_many(items, on_error="return"))
    assert [n for n in range(20) if got[n] != n] == [3, 5, 7]
    assert "cannot score 3" in got[3].message and got[3].code == "scoring-failed"
    assert (got[3].detail["status"], got[3].detail["item"]) == ("INTERNAL", 3)
    assert isinstance(got[5], Invalid) and got[5].detail["item"] == 5 and "complex" in got[5].message
    assert isinstance(got[7], Invalid)
    seen = []
    with pytest.raises(ModelyardError, match="cannot score 3") as caught:
        for result in scorer.infer_many(items):
            seen.append(int(result["n"][0]))  # type: ignore[index]
    assert seen == [0, 1, 2] and caught.value.detail["item"] == 3


def test_a_failed_call_says_why(server: Replica, scorer: ScoringClient) -> None:
    with pytest.raises(ModelyardError, match="cannot score 9") as caught:
        scorer.infer({"fail": np.array([9])})
    assert caught.value.detail["status"] == "INTERNAL"
    with pytest.raises(Unavailable) as late:
        scorer.infer({"sleep": np.array([1.0])}, timeout_s=0.2)
    assert late.value.code == "deadline-exceeded"
    with ScoringClient(server.grpc, model="nobody") as other:
        for call in (lambda: other.infer({"x": np.ones(1)}), lambda: list(other.infer_many(numbers(1)))):
            with pytest.raises(NotFound, match="nobody"):
                call()


def test_what_the_source_raises_comes_behind_the_results_before_it(scorer: ScoringClient) -> None:
    def source() -> Iterator[Any]:
        yield from numbers(10)
        raise KeyError("the source")

    seen = []
    with pytest.raises(KeyError, match="the source"):
        for result in scorer.infer_many(source()):
            seen.append(int(result["n"][0]))  # type: ignore[index]
    assert seen == list(range(10))


def test_who_reads_slowly_is_asked_slowly(scorer: ScoringClient) -> None:
    taken = 0

    def source() -> Iterator[Any]:
        nonlocal taken
        for item in numbers(200):
            taken += 1
            yield item

    for given, _ in enumerate(scorer.infer_many(source(), in_flight=10)):
        assert taken <= given + 1 + 10
    assert taken == 200


async def test_who_reads_slowly_is_asked_slowly_async(server: Replica) -> None:
    taken = given = 0

    async def source() -> AsyncIterator[Any]:
        nonlocal taken
        for item in numbers(100):
            taken += 1
            assert taken <= given + 1 + 10
            yield item

    async with AsyncScoringClient(server.grpc, model="echo") as client:
        async for _ in client.infer_many(source(), in_flight=10):
            given += 1
            await asyncio.sleep(0.001)
    assert taken == given == 100


@pytest.mark.slow
def test_each_item_has_a_deadline(scorer: ScoringClient) -> None:
    began = time.monotonic()
    (late,) = scorer.infer_many([{"sleep": np.array([1.5])}], timeout_s=0.5, on_error="return")
    assert time.monotonic() - began < 15
    assert isinstance(late, Unavailable) and late.code == "deadline-exceeded"
    assert values(scorer.infer_many(numbers(5))) == list(range(5)), "those behind it have their own"


def test_leaving_early_leaves_nothing(server: Replica) -> None:
    before = set(threading.enumerate())
    client = ScoringClient(server.grpc, model="echo")
    results = client.infer_many({"n": np.array([n]), "sleep": np.array([0.01])} for n in range(1000))
    next(results)
    results.close()  # type: ignore[attr-defined]
    wait_until(lambda: in_flight(server) == 0)
    running = client.infer_many(numbers(1000), in_flight=4)
    next(running)
    client.close()
    with pytest.raises(Unavailable, match="closed"):
        list(running)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.infer({"x": np.ones(1)})
    new = set(threading.enumerate()) - before  # grpcio keeps threads of its own
    wait_until(lambda: not any(thread.is_alive() for thread in new if thread.name.startswith("modelyard")))


async def test_cancelling_leaves_nothing(server: Replica) -> None:
    async with AsyncScoringClient(server.grpc, model="echo") as client:
        before = asyncio.all_tasks()

        async def use() -> None:
            slow = ({"sleep": np.array([0.05])} for _ in range(1000))
            async with contextlib.aclosing(client.infer_many(slow)) as results:  # type: ignore[type-var]
                async for _ in results:
                    pass

        task = asyncio.create_task(use())
        await asyncio.to_thread(wait_until, lambda: in_flight(server) > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):
            while asyncio.all_tasks() != before:  # grpcio's own tasks end when they hear of it
                await asyncio.sleep(0.01)
        await asyncio.to_thread(wait_until, lambda: in_flight(server) == 0)


def in_flight(server: Replica) -> float:
    lines = server.get("/metrics")[1].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("modelyard_scoring_in_flight"))


def wait_until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_what_a_full_queue_refuses_is_sent_again(tmp_path: Path) -> None:
    with serving(tmp_path, "h2", max_queue=4) as server, ScoringClient(server.grpc, model="echo") as client:
        items = ({"n": np.array([n]), "sleep": np.array([0.002])} for n in range(100))
        assert values(client.infer_many(items, in_flight=32)) == list(range(100))
    assert sorted(ran(tmp_path)) == list(range(100))


@pytest.mark.slow
def test_one_client_uses_several_servers(tmp_path: Path) -> None:
    with serving(tmp_path / "a", "h2") as one, serving(tmp_path / "b", "grpc") as two:
        pids = {one.process.pid, two.process.pid}
        with ScoringClient([one.grpc, two.grpc], model="echo") as client:
            slow = ({"n": np.array([n]), "sleep": np.array([0.01])} for n in range(60))
            results = list(client.infer_many(slow, in_flight=8))
            assert values(results) == list(range(60))
            assert {int(r["pid"][0]) for r in results} == pids  # type: ignore[index]
            assert {int(client.infer({"x": np.ones(1)})["pid"][0]) for _ in range(4)} == pids


def test_nobody_there() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with ScoringClient(address, model="echo") as client:
        with pytest.raises(Unavailable, match=address) as caught:
            list(client.infer_many(numbers(3), outage_s=0.5, on_error="return"))
        assert caught.value.detail["item"] == 0
        with pytest.raises(Unavailable, match=address):
            client.infer({"x": np.ones(1)}, timeout_s=5)


@pytest.mark.parametrize("given", [
    {"address": "http://127.0.0.1:80"}, {"address": []}, {"model": ""}, {"timeout_s": 0}, {"connections": 0},
])
def test_arguments_that_cannot_be(given: dict[str, Any]) -> None:
    before = threading.active_count()
    with pytest.raises(Invalid):
        ScoringClient(**{"address": "127.0.0.1:1", "model": "echo", **given})
    assert threading.active_count() == before


def test_options_that_cannot_be(scorer: ScoringClient) -> None:
    for given in ({"in_flight": 0}, {"on_error": "ignore"}, {"timeout_s": -1}, {"metadata": {"k": "é"}}):
        with pytest.raises(Invalid):
            scorer.infer_many([], **given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_over_tls_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    arguments = ("--tls-cert", str(files["server.crt"]), "--tls-key", str(files["server.key"]),
                 "--tls-client-ca", str(files["ca.crt"]))
    with serving(tmp_path, "h2", *arguments) as server:
        known = Tls(files["ca.crt"], files["client.crt"], files["client.key"], server_name="localhost")
        with ScoringClient(server.grpc, model="echo", tls=known) as client:
            assert values([client.infer(next(numbers(1)))]) == [0]
            assert values(client.infer_many(numbers(50))) == list(range(50))
        stranger = Tls(files["ca.crt"], files["stranger.crt"], files["stranger.key"])
        for tls in (stranger, Tls(files["ca.crt"]), None):
            with ScoringClient(server.grpc, model="echo", tls=tls) as client, pytest.raises(Unavailable):
                client.infer(next(numbers(1)), timeout_s=3)
    for wrong in (Tls(tmp_path / "absent"), Tls(cert=files["client.crt"])):
        with pytest.raises(Invalid, match="TLS"):
            ScoringClient("127.0.0.1:1", model="echo", tls=wrong)
