"""The whole path on this machine: register, build, deploy, score, capture, watch, and nothing left behind.

    python demo/run.py

Everything happens in a temporary folder, through what any user has: the SDK, the command line, the gRPC stubs, HTTP.
The exit code is 0 only if every promise was kept.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from calls import Callers, channel, post, request, values
from stage import Broken, Server, Story, until

from modelyard import Client
from modelyard.cli.show import Steps
from modelyard.client import Deployment
from modelyard.core.errors import InUse, ModelyardError
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub

HERE = Path(__file__).parent
SCORE = HERE / "iris" / "score.py"
CALLERS = 4
BEFORE, AFTER = 200, 200
"""Calls that must be answered by the old version before the upgrade, and by the new one after it."""


class Demo:
    """One telling of the story; what later chapters need is kept here."""

    def __init__(self, story: Story, server: Server, yard: Client, folder: Path) -> None:
        self.story, self.server, self.yard, self.folder = story, server, yard, folder
        self.calls = 0
        """Calls to the iris deployment that were answered."""

    def tell(self) -> None:
        """Chapters 2 to 7; the first is the server's start."""
        self.register_build_deploy()
        self.one_command()
        self.score()
        self.upgrade()
        self.refuse()
        self.look_back()
        self.kill()

    def register_build_deploy(self) -> None:
        """Step by step, through the SDK."""
        self.story.chapter(2, "A scikit-learn model of iris flowers, step by step: register, build, deploy")
        import train  # loaded while the yard started

        self.train = train
        self.iris = train.iris(self.folder / "iris.skops", iterations=4)
        with Steps() as steps:
            steps.start("registering iris")
            model = self.yard.models.register(
                "iris", self.iris.path, tags={"team": "flora"}, properties={"accuracy": f"{self.iris.accuracy:.3f}"},
                framework_version=version("scikit-learn"), on_progress=steps)
            steps.done(f"model {model.id}, right for {self.iris.accuracy:.0%} of unseen flowers")
            image = self._built(model.id, steps)
            steps.start("deploying iris")
            service = self.yard.deployments.create("iris", image=image, replicas=2, capture=True)
            service.wait(180, on_progress=steps)
            steps.done(f"deployment iris is {service.phase}: gRPC {service.endpoints['grpc']}, "
                       f"REST {service.endpoints['rest']}")
        self.service = service

    def _built(self, model: str, steps: Steps) -> str:
        steps.start("building iris-scorer")
        needs = [f"{name}=={version(name)}" for name in ("numpy", "scikit-learn", "skops")]
        image = self.yard.images.build("iris-scorer", models=[model], score=SCORE, requirements=needs)
        image.wait(300, on_progress=steps)
        steps.done(f"image {image.id} of {model}, {str(image.digest)[:19]}…")
        return image.id

    def one_command(self) -> None:
        """An ONNX file, through the command line."""
        self.story.chapter(3, "An ONNX model of handwritten digits, with one command")
        self.digits = self.train.digits(self.folder / "digits.onnx")
        told = self.server.cli("deploy", str(self.digits.path), "--name", "digits")
        self.story.say(told.rstrip())
        self.story.promise("no scoring code was needed: the model's own graph answers", "REST" in told)

    def score(self) -> None:
        """Every door: gRPC raw and typed, REST /v2 and /score; one row and many."""
        self.story.chapter(4, "Score both over gRPC and REST, one row and many")
        rows: list[list[Any]] = []
        digits = self.yard.deployments.get("digits")
        for name, service, data, output in (
            ("iris", self.service, self.iris.rows.astype(np.float64), "species"),
            ("digits", digits, self.digits.rows, "label"),
        ):
            answers = [*_over_grpc(name, service, data, output), *_over_rest(name, service, data, output)]
            rows += [[name, how, len(one), _shown(one), len(many), _shown(many)] for how, one, many in answers]
            agreed = {tuple(map(str, many)) for _, _, many in answers}
            self.story.promise(f"{name}: all doors give the same answers", len(agreed) == 1)
        self.calls += 2 * 4
        self.story.show(rows, ["model", "over", "rows", "answer", "rows ", "answers"])

    def upgrade(self) -> None:
        """A better model takes over while clients keep calling."""
        self.story.chapter(5, "A better model takes over while clients keep calling")
        better = self.train.iris(self.folder / "iris-better.skops", iterations=200)
        rows = self.iris.rows[:1].astype(np.float64)
        with Callers(self.service.endpoints["grpc"], "iris", rows, CALLERS) as callers, Steps() as steps:
            until(lambda: callers.made >= BEFORE, 30, "clients are served by iris:1")
            model = self.yard.models.register(
                "iris", better.path, tags={"team": "flora"}, properties={"accuracy": f"{better.accuracy:.3f}"},
                framework_version=version("scikit-learn"), parent="iris:1")
            steps.done(f"model {model.id}, right for {better.accuracy:.0%} of unseen flowers")
            image = self._built(model.id, steps)
            steps.start("upgrading iris")
            self.service.update(image=image)
            self.service.wait(120, on_progress=steps)
            steps.done(f"generation {self.service.generation} serves {', '.join(self.service.models)}")
            until(lambda: callers.served[model.id] >= AFTER, 30, f"clients are served by {model.id}")
        self.calls += callers.served.total()
        self.story.show(
            [[who, count] for who, count in sorted(callers.served.items())]
            + [[f"failed: {why}", count] for why, count in callers.failed.items()], ["answered by", "calls"])
        self.story.promise(
            f"calls made {callers.made}, calls failed {callers.failed.total()}; the slowest took "
            f"{callers.slowest_ms:.0f} ms", not callers.failed)
        self.story.promise("both versions answered", set(callers.served) == {"iris:1", "iris:2"})

    def refuse(self) -> None:
        """What is used cannot be deleted."""
        self.story.chapter(6, "What is used cannot be deleted by accident")
        try:
            self.yard.models.delete("iris:1")
        except InUse as exc:
            self.story.say(f"delete iris:1: {exc.message}")
            blockers = exc.detail.get("blockers") or []
            self.story.show([[b["kind"], b["id"], b["phase"]] for b in blockers], ["kind", "id", "phase"])
            self.story.promise("refused, and the refusal names what is in the way", bool(blockers))
        else:
            self.story.promise("iris:1 is used by an image and cannot be deleted", False)

    def look_back(self) -> None:
        """Captured calls, their proof, windows, events."""
        self.story.chapter(7, "Look back: every call, proof that none is missing, telemetry, events")
        capture = self.yard.capture("iris")
        table = until(lambda: _enough(capture.read(), self.calls), 30, f"{self.calls} captured calls arrive")
        files = sorted((self.server.data / "blobs" / "capture" / "iris").rglob("*.parquet"))
        kept = sum(pq.read_metadata(file).num_rows for file in files if "collect=" not in str(file))
        wanted = ["time", "model", "protocol", "status", "latency_ms", "outputs.species", "outputs.probability"]
        names = [n for n in wanted if n in table.column_names]
        for part in (table.slice(0, 4), table.slice(table.num_rows - 4)):
            self.story.show([[_shown(row[n]) for n in names] for row in part.to_pylist()], names)
        self.story.promise(f"{self.calls} calls were answered and {table.num_rows} are captured, in {len(files)} "
                           f"Parquet files with {kept} rows", table.num_rows >= self.calls and kept >= self.calls)
        proof = capture.verify()
        self.story.show([[p["replica"], p["image"], p["state"], p["recorded"], p["missing"]]
                         for p in proof["processes"]], ["process", "image", "state", "recorded", "missing"])
        self.story.promise("capture verify: nothing is missing (open-ended: it runs still)", proof["complete"])
        self._windows()
        self._events()

    def _windows(self) -> None:
        windows = self.yard.telemetry("iris")
        self.story.show([
            [w["start"][11:19], w["image"], w["model"], w["requests"], sum(w["errors"].values()),
             *(f"{w['latency_ms'][p]:.2f}" for p in ("p50", "p90", "p99"))] for w in windows
        ], ["window", "image", "model", "requests", "errors", "p50 ms", "p90 ms", "p99 ms"])
        counted = sum(w["requests"] for w in windows)
        self.story.promise(f"telemetry counts {counted} requests", counted >= self.calls)

    def _events(self) -> None:
        events = [e for e in self.yard.events(after="beginning", follow=False) if not e.topic.startswith("capture.")]
        self.story.show([[f"{e.time:%H:%M:%S}", e.topic, e.subject, int(e.sequence)] for e in events],
                        ["event", "type", "subject", "sequence"])
        told = {e.topic for e in events}
        wanted = {"model.registered", "image.requested", "image.built", "deployment.requested", "deployment.ready",
                  "deployment.updated"}
        self.story.promise("the event list tells the whole story", wanted <= told)

    def kill(self) -> None:
        """A replica dies and comes back."""
        self.story.chapter(8, "Kill a replica")
        capture = self.yard.capture("iris")
        known = _processes(capture.verify())
        before = self.server.replicas("iris")
        began = time.monotonic()
        os.kill(before[0], signal.SIGKILL)
        answer = self.yard.deployments.score("iris", self.iris.rows[:1].tolist())
        self.story.say(f"process {before[0]} was killed; a call meanwhile: {answer}")
        until(lambda: len(set(self.server.replicas("iris")) - set(before)) == 1, 60, "a new process is started")
        until(lambda: self.yard.deployments.get("iris").replicas_ready == len(before), 60, "it is ready")
        new = until(lambda: _processes(capture.verify()) - known, 60, "its capture begins")
        self.story.promise(f"replica {', '.join(sorted(new))} took its place after {time.monotonic() - began:.1f} s; "
                           f"{len(before)} of {len(before)} are ready", len(new) == 1)


def _processes(proof: Any) -> set[str]:
    return {process["replica"] for process in proof["processes"]}


def _over_grpc(name: str, service: Deployment, data: np.ndarray, output: str) -> list[tuple[str, list[Any], list[Any]]]:
    with channel(service.endpoints["grpc"]) as open_channel:
        stub = GRPCInferenceServiceStub(open_channel)
        return [(
            f"gRPC ModelInfer, {'typed' if typed else 'raw'} contents",
            values(stub.ModelInfer(request(name, data[:1], typed=typed), timeout=30))[output],
            values(stub.ModelInfer(request(name, data[:8], typed=typed), timeout=30))[output],
        ) for typed in (False, True)]


def _over_rest(name: str, service: Deployment, data: np.ndarray, output: str) -> list[tuple[str, list[Any], list[Any]]]:
    rest = service.endpoints["rest"]
    datatype = "FP32" if data.dtype == np.float32 else "FP64"

    def infer(rows: np.ndarray) -> list[Any]:
        tensor = {"name": "X", "datatype": datatype, "shape": list(rows.shape), "data": rows.ravel().tolist()}
        outputs = post(f"{rest}/v2/models/{name}/infer", {"inputs": [tensor]})["outputs"]
        return next(list(o["data"]) for o in outputs if o["name"] == output)

    def plain(rows: np.ndarray) -> list[Any]:
        return list(post(f"{rest}/score", {"data": rows.tolist()})[output])

    return [(f"REST /v2/models/{name}/infer", infer(data[:1]), infer(data[:8])),
            ("REST /score", plain(data[:1]), plain(data[:8]))]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:%H:%M:%S.%f}"[:-3] if hasattr(value, "strftime") else str(value)


def _enough(table: Any, calls: int) -> Any:
    return table if table.num_rows >= calls else None


def main() -> int:
    """Tells the story; 0 if every promise was kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    story = Story()
    with tempfile.TemporaryDirectory(prefix="modelyard-demo-") as name:
        server = Server(Path(name))
        try:
            story.chapter(1, "Start a yard: every service in one process, on an empty data folder")
            loading = threading.Thread(target=importlib.import_module, args=("train",), daemon=True)
            loading.start()  # scikit-learn and its friends, while the yard starts
            with server, Client(server.url) as yard:
                loading.join()
                story.promise(f"modelyard serve answers at {server.url}; its data is in {server.data}", True)
                Demo(story, server, yard, Path(name)).tell()
                story.chapter(9, "Stop")
                yard.close()
                left = server.stop()
                story.promise("stopped; nothing is left running", not left)
        except (Broken, ModelyardError) as exc:
            story.promise(f"{exc}", False)
            print(f"the server's last words:\n{server.log}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped; everything that was started is gone", file=sys.stderr)
            return 130
    took = time.monotonic() - story.began
    print(f"\n{'every promise was kept' if not story.broken else f'{len(story.broken)} promises were broken'}, "
          f"in {took:.1f} s", flush=True)
    return 1 if story.broken else 0


if __name__ == "__main__":
    sys.exit(main())
