"""Clients that no server wishes for, beside good ones: the good ones are answered all the same, and when the others
have left, their memory and their descriptors are back. How much slower the good ones get,
tests/benchmarks/bench_overload.py tells."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import grpc
import numpy as np
import pytest

from tests import bad_clients
from tests.contract.transports import INFER, Served, ask, outcome, serving, wait_for

pytestmark = pytest.mark.slow  # real programs are started, and thousands of connections
LARGE = np.zeros(8_192)
"""64 KiB."""
REST_PATH = "/v2/models/flower/infer"
GOOD = 200


@dataclass
class Door:
    """One protocol of a replica, and what is asked through it."""

    served: Served
    kind: str

    @property
    def address(self) -> str:
        return self.served.replica.http if self.kind == "rest" else self.served.address

    def good(self) -> None:
        """Calls as they should be: each is answered rightly."""
        if self.kind == "rest":
            connection = http.client.HTTPConnection(self.address, timeout=20)
            for n in range(GOOD):
                connection.request("POST", REST_PATH, rest(np.full(1, float(n))))
                answer = connection.getresponse()
                assert answer.status == 200 and json.loads(answer.read())["outputs"][0]["data"] == [n]
            connection.close()
            return
        with grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            infer = channel.unary_unary(INFER)
            for n in range(GOOD):
                assert outcome(infer(ask(np.full(1, float(n))), timeout=20)).tolist() == [n]

    def slow_readers(self) -> AbstractContextManager[None]:
        if self.kind == "rest":
            return bad_clients.slow_readers_rest(self.address, REST_PATH, rest(LARGE), 20, 30)
        return bad_clients.slow_readers(self.address, ask(LARGE), 20, 30)

    def idlers(self) -> AbstractContextManager[None]:
        return bad_clients.idlers(self.address, 2_000, self.kind != "rest")

    def leavers(self) -> AbstractContextManager[None]:
        if self.kind == "rest":
            return bad_clients.leavers(self.address, bad_clients.post(REST_PATH, rest(LARGE), 1 << 20))
        return bad_clients.leavers(self.address, bad_clients.half_streams(ask()))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.served.replica.process.pid}/fd"))

    def resident_mib(self) -> float:
        return self.served.resident_mib()

    def in_flight(self) -> int:
        return self.served.in_flight()


def rest(x: np.ndarray) -> bytes:
    tensor = {"name": "x", "datatype": "FP64", "shape": list(x.shape), "data": x.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.fixture(scope="module", params=["h2", "grpc", "rest"])
def door(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    transport = "h2" if request.param == "rest" else request.param
    with serving(tmp_path_factory.mktemp(request.param), transport) as served:
        door = Door(served, request.param)
        door.good()
        yield door


@pytest.mark.parametrize("what", ["slow_readers", "idlers", "leavers"])
def test_good_clients_are_answered_beside_bad_ones(door: Door, what: str) -> None:
    bad: Callable[[], AbstractContextManager[None]] = partial(getattr(door, what))
    before, resident = door.descriptors(), [door.resident_mib()]
    for _ in range(2):
        with bad():
            door.good()
            worst = door.resident_mib()
        wait_for(lambda: door.descriptors() <= before + 2, 20, "the end of their connections")
        wait_for(lambda: door.in_flight() == 0, 20, "the end of their calls")
        resident.append(door.resident_mib())
    print(f"{door.kind} {what}: {resident[0]:.0f} MiB, {worst:.0f} with them, {resident[1]:.0f} and "
          f"{resident[2]:.0f} after")
    assert worst < resident[0] + 256, "they have a bounded part of the memory"
    assert resident[2] < resident[1] + 32, "a second time needs no more than the first"
