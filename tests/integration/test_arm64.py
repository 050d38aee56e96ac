"""An image for linux/arm64 that is made on another machine: all of it is for arm64, and it answers, emulated."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from infra.stack import arm64
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.unit.image_builder.conftest import Yard, running
from tests.unit.image_builder.test_bases import Layout, layer

pytestmark = pytest.mark.slow
AARCH64 = 183
START_S = 150.0
"""For a server to answer, emulated on a loaded machine; 10 s on a quiet one."""
SCORE = b"""
import platform

import numpy


def run(data):
    return {"sum": float(numpy.asarray(data["data"]).sum()), "machine": platform.machine()}
"""


async def unpack(yard: Yard, root: Path, repo: str, tag: str) -> None:
    found = await yard.images.images.get_manifest(repo, tag)
    assert found is not None
    for part in json.loads(found[0])["layers"]:
        raw = b"".join([chunk async for chunk in yard.images.images.get_blob(repo, part["digest"])])
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            files = [m for m in archive if m.isreg() or m.isdir() or m.issym() or m.islnk()]
            await asyncio.to_thread(archive.extractall, root, files, filter="tar")


async def built(folder: Path, base: bytes) -> Path:
    """The files of an image for arm64, on a base of one layer."""
    (folder / "base").mkdir()
    layout = Layout(folder / "base")
    async with running(folder / "yard") as yard:
        asked = await yard.post(name="sum", score=await yard.upload(SCORE), platform="linux/arm64",
                                base=layout.tag(layout.image(base, machine="arm64")))
        doc = await yard.over(asked["id"])
        assert doc["phase"] == "ready" and doc["platform"] == "linux/arm64", doc["reason"]
        await unpack(yard, folder / "root", "sum", "1")
    return folder / "root"


def machine(path: Path) -> int | None:
    """Of an ELF file, as its header says."""
    with path.open("rb") as file:
        head = file.read(20)
    return int.from_bytes(head[18:20], "little") if head[:4] == b"\x7fELF" else None


async def test_every_program_in_it_is_for_arm64(tmp_path: Path) -> None:
    root = await built(tmp_path, layer({"usr/bin/python3.11": b"\x7fELF" + bytes(14) + AARCH64.to_bytes(2, "little"),
                                        "usr/lib/aarch64-linux-gnu/libstdc++.so.6": b""}))
    found = {path.relative_to(root).as_posix(): machine(path) for path in root.rglob("*") if path.is_file()}
    programs = {name: kind for name, kind in found.items() if kind is not None}
    assert any("cygrpc" in name for name in programs) and any("/h2corn/" in name for name in programs)
    assert {name: kind for name, kind in programs.items() if kind != AARCH64} == {}


@contextlib.contextmanager
def served(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The server of an image, emulated: its address and its log."""
    log, address = folder / "log", f"unix:{folder}/grpc"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [str(arm64.home() / "qemu"), "-L", str(root), str(root / "usr/bin/python3.11"), "-I", "-S",
             str(root / "opt/modelyard/launch.py"), "serve", "--grpc", address,
             "--http", f"unix:{folder}/http", "--admin", f"unix:{folder}/admin"],
            env={"PATH": os.environ["PATH"]}, stdout=out, stderr=out, process_group=0)
    try:
        yield address, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def asked() -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="data", datatype="FP64", shape=[3])
    return pb.ModelInferRequest(model_name="model", inputs=[tensor],
                                raw_input_contents=[np.array([1.5, 2.0, 4.0]).tobytes()])


@pytest.mark.skipif(bool(arm64.missing()), reason=arm64.missing())
async def test_it_answers(tmp_path: Path) -> None:
    root = await built(tmp_path, (await asyncio.to_thread(arm64.home) / "root.tar").read_bytes())
    await asyncio.to_thread(answers, root, tmp_path)


def answers(root: Path, folder: Path) -> None:
    with served(root, folder) as (address, log), grpc.insecure_channel(address) as channel:
        end = time.monotonic() + START_S
        while True:
            try:
                answer = GRPCInferenceServiceStub(channel).ModelInfer(asked(), timeout=20, wait_for_ready=False)
                break
            except grpc.RpcError as exc:
                assert exc.code() is grpc.StatusCode.UNAVAILABLE and time.monotonic() < end, f"{exc}\n{log.read_text()}"
                time.sleep(0.1)
        said = answer.raw_output_contents[0]
        assert json.loads(said[4:]) == {"sum": 7.5, "machine": "aarch64"}  # behind the length of the one string
