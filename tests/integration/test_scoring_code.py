"""Scoring code that does what it should not, in real replicas under a real supervisor: its callers get the documented
status, its replica is started anew where nothing else helps, and the other replica and the other deployment never
notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from modelyard.adapters import urls
from modelyard.client.oip import OPTIONS
from modelyard.core.inference import Inference, read_response, write_request
from modelyard.core.tensors import Tensor
from modelyard.ports.targets import DeploymentTarget, Observed, Workload
from tests import handmade
from tests.bad_clients import INFER

pytestmark = pytest.mark.slow  # real replicas are hurt, and start again
WITHIN_S = 60
BAD = '''
import ctypes, os, re, signal, subprocess, sys, threading, time

kept = []

def leak():
    while True:
        kept.append(os.urandom(1 << 20) * 16)
        time.sleep(0.02)

def flood():
    for _ in range(400):
        os.write(1, b"x" * 199 + b"\\n" * 57 + b"y" * 100_000)
        print("z" * 50_000)

def threads():
    for _ in range(200):
        threading.Thread(target=threading.Event().wait).start()

def processes():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # left-behind"])

DOES = {
    "nothing": int,
    "raise": lambda: {}["no such key"],
    "sys.exit": lambda: sys.exit("I want to go"),
    "exit": lambda: os._exit(7),
    "crash": lambda: ctypes.string_at(0),
    "hang": lambda: time.sleep(3600),
    "seize": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),
    "leak": leak,
    "close": lambda: os.closerange(3, 4096),
    "close stdout": lambda: os.closerange(0, 3),
    "flood": flood,
    "threads": threads,
    "processes": processes,
    "fork": os.fork,
    "signal": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "block": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)),
}

def run(data):
    DOES[data["do"]]()
    return {"pid": os.getpid()}
'''
FAST = {"MODELYARD_STUCK_S": "3"}
ONE_CALL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


class Yard:
    """Two replicas of bad code, and another deployment that is called without pause."""

    def __init__(self, target: DeploymentTarget) -> None:
        self.target = target
        self.seen: Observed
        self.failed: list[str] = []
        self.made = 0

    async def until(self, when: Any, within_s: float = WITHIN_S, name: str = "bad") -> Observed:
        async with asyncio.timeout(within_s):
            while not when(seen := await self.target.observe("default", name)):
                await asyncio.sleep(0.05)
        return seen

    async def do(self, what: str, timeout_s: float = 20) -> Any:
        """One call without retry, by REST on a connection of its own: the JSON of the answer, or (status, problem)."""
        async with aiohttp.ClientSession() as session, session.post(
                self.seen.endpoints["rest"] + "/score", json={"do": what},
                timeout=aiohttp.ClientTimeout(total=timeout_s)) as answer:
            told = await answer.json()
            return told if answer.status == 200 else (answer.status, told)

    async def ask(self, what: str, timeout_s: float = 20) -> Any:
        """The same by gRPC: the JSON of the answer, or (code, what is said of it)."""
        async with grpc.aio.insecure_channel(self.seen.endpoints["grpc"], ONE_CALL) as channel:
            try:
                answer = await channel.unary_unary(INFER)(ask("bad", json.dumps({"do": what}).encode()),
                                                          timeout=timeout_s)
            except grpc.aio.AioRpcError as exc:
                return exc.code().name, exc.details()
            return json.loads(read_response(answer).tensors[0].array.item())

    async def healed(self, restarted: int = 1) -> Observed:
        """Two ready replicas again, and the same one has gone on."""
        old = {r.pid for r in self.seen.replicas}
        seen = await self.until(lambda o: o.ready == 2 and len(old - {r.pid for r in o.replicas}) == restarted)
        assert sum(r.restarts for r in seen.replicas) == restarted
        assert {(await self.do("nothing"))["pid"] for _ in range(8)} <= {r.pid for r in seen.replicas}
        return seen

    async def logged(self, text: str) -> None:
        """Waits until the deployment's log has it."""
        async with asyncio.timeout(10):
            while text not in b"".join([p async for p in self.target.logs("default", "bad", 200)]).decode("latin-1"):
                await asyncio.sleep(0.05)


def ask(model: str, text: bytes) -> bytes:
    import numpy as np

    tensor = Tensor("b", np.array([text], object), "BYTES", {"content_type": "application/json"})
    return write_request(Inference(model, tensors=[tensor]))


@contextlib.asynccontextmanager
async def called(yard: Yard, address: str, model: str, body: bytes) -> AsyncIterator[None]:
    """A caller with gRPC's standard retry, all the while."""
    async with grpc.aio.insecure_channel(address, [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        infer = channel.unary_unary(INFER)

        async def call() -> None:
            while True:
                try:
                    read_response(await infer(ask(model, body), timeout=20))
                    yard.made += 1
                except grpc.aio.AioRpcError as exc:
                    yard.failed.append(f"{model}: {exc.code()} {exc.details()}")
                await asyncio.sleep(0.01)

        task = asyncio.create_task(call())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@pytest.fixture
async def yard(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Yard]:
    """``transport``: the test's parameter of this name, else what is chosen by itself."""
    asked = getattr(request.node, "callspec", None)
    transport = asked.params.get("transport", "auto") if asked is not None else "auto"
    images = await urls.open_images(f"oci-layout://{tmp_path}/images")
    grants = await urls.open_grants(f"file://{tmp_path}/blobs")
    target = await urls.open_target("local", "process://", images=images, data=tmp_path)
    yard = Yard(target)
    for name, score, replicas in (("bad", BAD, 2), ("other", handmade.ECHO, 1)):
        digest = await handmade.image(images, "scorer", name, score)
        await target.apply(Workload(
            workspace="default", name=name, generation=1, image="scorer:1", repo="scorer", digest=digest,
            replicas=replicas, models=(), ports={}, capture={"enabled": True}, limits={"timeout_ms": 1000},
            env={**FAST, "MODELYARD_TRANSPORT": transport}, resources={"memory": "400Mi"},
            grant=await grants.lend("default", name, 3600),
            progress_deadline_s=60))
    yard.seen = await yard.until(lambda o: o.ready == 2)
    other = await yard.until(lambda o: o.ready == 1, name="other")
    async with called(yard, other.endpoints["grpc"], "other", b"1"):
        yield yard
        made = yard.made
        await yard.until(lambda o: yard.made > made + 3, 20, "other")
    assert yard.failed == [] and yard.made > 2
    after = await target.observe("default", "other")
    assert [(r.pid, r.restarts) for r in after.replicas] == [(r.pid, 0) for r in other.replicas]
    assert left_behind(tmp_path), "what runs is seen"
    began = time.monotonic()
    for name in ("bad", "other"):
        await target.remove("default", name)
    assert time.monotonic() - began < 60 and await target.list() == []
    assert not left_behind(tmp_path), "what scoring code started ends with its replica"


def left_behind(folder: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                said = Path(f"/proc/{entry}/cmdline").read_text()
                if ("left-behind" in said and "time.sleep(600)" in said) or str(folder) in said:
                    found.append(entry)
    return found


@pytest.mark.parametrize(("what", "answer", "why"), [
    ("exit", None, "exited with code 7"),
    ("crash", None, "was ended by signal 11"),
    ("close", None, ""),
    ("leak", 504, "more than its limit of 400 MiB"),
    ("hang", 504, "killed: the code of a model hangs"),
    ("seize", None, "killed: it answered no probe"),
])
async def test_what_ends_its_replica_ends_nothing_else(yard: Yard, what: str, answer: int | None, why: str) -> None:
    try:
        status, problem = await yard.do(what)
        assert status == answer and problem["code"] == "past-deadline"
    except (aiohttp.ClientError, TimeoutError):
        assert answer is None, "the server itself is hurt: nobody can answer"
    await yard.healed()
    await yard.logged(why)


async def test_what_can_be_borne_ends_no_replica(yard: Yard) -> None:
    said = {
        "raise": (500, "KeyError: 'no such key'"), "sys.exit": (500, "SystemExit: I want to go"),
        "signal": (500, "ValueError: signal only works in main thread of the main interpreter"),
        "block": None, "threads": None, "processes": None, "fork": None, "flood": None, "close stdout": None}
    pids = {r.pid for r in yard.seen.replicas}
    for what, wanted in said.items():
        told = await yard.do(what)
        if wanted is None:
            assert told["pid"] in pids, what
        else:
            assert (told[0], told[1]["code"], told[1]["detail"]) == (wanted[0], "scoring-failed", wanted[1])
            await yard.logged("Traceback")
        assert (await yard.do("nothing"))["pid"] in pids, what
    seen = await yard.until(lambda o: o.ready == 2)
    assert {r.pid for r in seen.replicas} == pids and not any(r.restarts for r in seen.replicas)


@pytest.mark.parametrize("transport", ["h2", "grpc"])
async def test_callers_by_grpc_are_told_alike(yard: Yard, transport: str) -> None:
    """What can be borne, then what cannot: the code hangs, and then ends its process."""
    await yard.logged({"h2": "(h2corn)", "grpc": "(grpcio)"}[transport])
    for what, said in (("raise", "KeyError: 'no such key'"), ("sys.exit", "SystemExit: I want to go")):
        assert await yard.ask(what) == ("INTERNAL", said)
    pids = {r.pid for r in yard.seen.replicas}
    for what in ("flood", "close stdout", "fork"):
        assert (await yard.ask(what))["pid"] in pids, what
    assert (await yard.ask("hang"))[0] == "DEADLINE_EXCEEDED"
    yard.seen = await yard.healed()
    assert (await yard.ask("exit"))[0] == "UNAVAILABLE"
    await yard.until(lambda o: o.ready == 2 and sum(r.restarts for r in o.replicas) == 2)
    assert "pid" in await yard.ask("nothing")
