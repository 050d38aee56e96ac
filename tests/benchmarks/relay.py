"""What the relay costs: the same calls straight to a replica's own socket and through the deployment's address.

    python tests/benchmarks/relay.py [SECONDS]

One deployment of one replica; one caller at a time, then eight. Milliseconds a call, p50 and p99; the two ways take
turns of a second, so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp
import grpc.aio

from modelyard.adapters import urls
from modelyard.ports.targets import Observed, Workload
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests import handmade

BODY = b'{"data": [1, 2, 3]}'


def request() -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="data", datatype="INT64", shape=[3])
    tensor.contents.int64_contents.extend([1, 2, 3])
    return pb.ModelInferRequest(model_name="iris", inputs=[tensor])


class Grpc:
    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self.infer = GRPCInferenceServiceStub(self.channel).ModelInfer

    async def call(self) -> None:
        await self.infer(request())

    async def close(self) -> None:
        await self.channel.close()


class Rest:
    def __init__(self, connector: aiohttp.BaseConnector, url: str) -> None:
        self.session, self.url = aiohttp.ClientSession(connector=connector), f"{url}/score"

    async def call(self) -> None:
        async with self.session.post(self.url, data=BODY, headers={"content-type": "application/json"}) as answer:
            assert answer.status == 200
            await answer.read()

    async def close(self) -> None:
        await self.session.close()


async def calls(client: Grpc | Rest, callers: int, seconds: float, times: list[float]) -> None:
    until = time.perf_counter() + seconds

    async def one() -> None:
        while (began := time.perf_counter()) < until:
            await client.call()
            times.append(time.perf_counter() - began)

    await asyncio.gather(*(one() for _ in range(callers)))


def line(what: str, times: list[float]) -> str:
    times.sort()
    p50, p99 = (times[int(len(times) * q)] * 1000 for q in (0.5, 0.99))
    return f"{what:28} {len(times):6} calls   p50 {p50:6.2f} ms   p99 {p99:6.2f} ms"


async def measure(seen: Observed, sockets: Path, seconds: int) -> None:
    private = {path.suffix: path for path in sockets.iterdir()}
    ways: dict[str, dict[str, Grpc | Rest]] = {
        "grpc": {"direct": Grpc(f"unix:{private['.grpc']}"), "relayed": Grpc(seen.endpoints["grpc"])},
        "rest": {"direct": Rest(aiohttp.UnixConnector(str(private[".rest"])), "http://localhost"),
                 "relayed": Rest(aiohttp.TCPConnector(), seen.endpoints["rest"])},
    }
    for protocol, both in ways.items():
        for callers in (1, 8):
            times: dict[str, list[float]] = {way: [] for way in both}
            for turn in range(-1, seconds):
                for way, client in both.items():
                    await calls(client, callers, 1.0, times[way] if turn >= 0 else [])
            for way, seen_times in times.items():
                print(line(f"{protocol} {way}, {callers} at once", seen_times))
        for client in both.values():
            await client.close()


async def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(prefix="relay-") as folder:
        data = Path(folder)
        images = await urls.open_images(f"oci-layout://{data}/images")
        grants = await urls.open_grants(f"file://{data}/blobs")
        target: Any = await urls.open_target("local", "process://", images=images, data=data)
        try:
            await target.apply(Workload(
                workspace="default", name="iris", generation=1, image="scorer:1", repo="scorer",
                digest=await handmade.image(images, "scorer", "1"), replicas=1, models=(), ports={}, capture={},
                limits={}, grant=await grants.lend("default", "iris", 600)))
            while not (seen := await target.observe("default", "iris")).ready:
                await asyncio.sleep(0.1)
            await measure(seen, data / "run/default/iris/s", seconds)
        finally:
            await target.remove("default", "iris")


if __name__ == "__main__":
    asyncio.run(main())
