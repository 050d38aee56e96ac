"""A small scikit-learn model as ONNX, where an image asks for it (``onnx``) and the graph answers the same.

``onnx_hook.py`` loads, converts and compares, in the sandbox; nothing of a model is loaded here. Whatever is in the
way, scikit-learn serves as it does without, and a line of the log says why.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import BuildFailed
from . import parts, sandbox, uv
from .locks import Lock
from .log import BuildLog
from .memo import Memo, key
from .parts import Graph, Place
from .pull import Folder
from .request import own_platform, own_python
from .resolve import Resolver
from .sources import BATCH, Source

HOOK = Path(__file__).with_name("onnx_hook.py")
KINDS = frozenset({"skops", "pickle"})
TOOLS = frozenset({"skl2onnx>=1.19,<2", "onnx>=1.17", "onnxruntime>=1.20", "skops", "numpy"})
LIMITS = sandbox.Limits(cpu_s=300, wall_s=300.0, disk=64 << 20, files=2000, result=16 << 20, said=20_000)
DTYPE = re.compile(r"[<|]?[fiubUO][0-9]{0,5}", re.ASCII)
METHODS = {"predict", "predict_proba"}
SAMPLE = "there is no sample to compare the two by: models register --sample gives one"
OFFER = ("model '{}' could be served as ONNX, where that answers the same: a smaller image, and less CPU for a call: "
         "--onnx")


def unfit(place: Place, lock: str | None, python: str, platform: str) -> str:
    """Why a scikit-learn model is not tried at all; "" where it is."""
    if lock is not None:
        return "the image has a lock, which is used as it is"
    if place.model.size >= BATCH:
        return f"it has {place.model.size} bytes; less than {BATCH} are converted"
    if (platform, python) != (own_platform(), own_python()):
        return (f"that is done for the machine and the Python that run the image builder only ({own_platform()}, "
                f"Python {own_python()})")
    return "" if place.model.sample else SAMPLE


@dataclass(frozen=True)
class Converter:
    """Of one build. ``folder`` makes one for temporary files; ``hidden`` is what the sandbox does not see."""

    resolver: Resolver
    log: BuildLog
    memo: Memo
    folder: Folder
    hidden: Sequence[Path]

    async def all(self, places: Sequence[Place], sources: Mapping[str, Source]) -> list[Place]:
        """The places, with those of graphs in place of the models that became one. ``sources`` by model id."""
        doc = self.resolver.doc
        reasons = {p.model.id: unfit(p, doc.lock, doc.python_version, doc.platform)
                   for p in places if p.kind in KINDS}
        fit = [p for p in places if reasons.get(p.model.id) == ""]
        if not doc.onnx:
            for place in fit:
                self.log.note(OFFER.format(place.model.id))
            return list(places)
        graphs: dict[str, Graph] = {}
        if fit:
            graphs, whys = await self.graphs(fit, sources)
            reasons |= whys
        for id, why in reasons.items():
            if id not in graphs:
                self.log.note(f"model '{id}' is served by scikit-learn, not as ONNX: {why}")
        return [replace(p, kind="onnx", graph=graphs[p.model.id]) if p.model.id in graphs else p for p in places]

    async def graphs(self, fit: Sequence[Place], sources: Mapping[str, Source],
                     ) -> tuple[dict[str, Graph], dict[str, str]]:
        """By model id: the graph, or why there is none. One environment for all: the image has one runtime."""
        found: dict[str, Graph] = {}
        whys: dict[str, str] = {}
        try:
            lock = await self.resolver.tools({*TOOLS, *parts.needs(fit)})
        except BuildFailed as exc:
            return {}, {p.model.id: f"there is no environment to convert it in: {exc.message}" for p in fit}
        box: list[Path] = []
        for place in fit:
            try:
                found[place.model.id] = graph = await self.one(place, lock, sources[place.model.id], box)
                self.log.note(f"model '{place.model.id}' is served as ONNX ({graph.told['precision']}, "
                              f"{graph.runtime}): on its sample and rows about it, {graph.told['rows']} in all, it "
                              "answers as scikit-learn does")
            except BuildFailed as exc:
                whys[place.model.id] = exc.message
        return found, whys

    async def one(self, place: Place, lock: Lock, source: Source, box: list[Path]) -> Graph:
        """As remembered, or made now. BuildFailed where it is not to be."""
        model = place.model
        runtime = next(pin.text for pin in lock.pins if pin.name == "onnxruntime")
        name = key("onnx", model.artifact, model.trusted, place.kind, model.sample, lock.digest, await hook_digest())
        made = await self.memo.get(name)
        if made is None:
            if not box:
                box.append(await self.toolbox(lock))
            made = await self.converted(place, source, box[0])
            await self.memo.put(name, made)
        if "why" in made:
            raise BuildFailed(made["why"])
        return Graph(base64.b64decode(made["graph"]), runtime, made["told"])

    async def toolbox(self, lock: Lock) -> Path:
        program, _ = await asyncio.to_thread(sandbox.python)
        return await uv.toolbox(lock, program, await self.folder(), self.log, self.resolver.sdists.links)

    async def converted(self, place: Place, source: Source, tools: Path) -> dict[str, Any]:
        """What the hook left: ``{"why"}``, or ``{"graph", "told"}``."""
        model = place.model
        here = await self.folder() / f"onnx-{model.name}"
        await asyncio.to_thread(here.mkdir, exist_ok=True)
        file, asked, hook = here / parts.NAMES[place.kind], here / "asked.json", here / HOOK.name
        await asyncio.to_thread(_laid_out, file, source, hook)
        await asyncio.to_thread(asked.write_text, json.dumps({"sample": model.sample, "trusted": model.trusted}))
        self.log.note(f"model '{model.id}' is converted to ONNX and the two are compared, for "
                      f"{LIMITS.wall_s:.0f} seconds at most")
        left = await sandbox.run(
            "converting it", ["/env/bin/python", "-sB", f"/in/{hook.name}", f"/in/{file.name}", f"/in/{asked.name}",
                              "/out"], here, self.log, limits=LIMITS, hidden=self.hidden, path="/env/bin",
            shown={f"/in/{hook.name}": hook, f"/in/{file.name}": file, f"/in/{asked.name}": asked, "/env": tools})
        return await asyncio.to_thread(_read, left)


async def hook_digest() -> str:
    return hashlib.sha256(await asyncio.to_thread(HOOK.read_bytes)).hexdigest()


def _laid_out(file: Path, source: Source, hook: Path) -> None:
    if isinstance(source, bytes):
        file.write_bytes(source)
    else:
        shutil.copyfile(source, file)
    shutil.copyfile(HOOK, hook)


def _read(left: Mapping[str, Path]) -> dict[str, Any]:
    """BuildFailed where it is not in the hook's form: the model may have written it. Blocking."""
    try:
        said = json.loads(left["report.json"].read_bytes()[:100_000])
        if "why" in said:
            return {"why": str(said["why"])[:300]}
        graph = left["model.onnx"].read_bytes()
        return {"graph": base64.b64encode(graph).decode(), "told": told(said)}
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BuildFailed(f"the conversion left no report that can be read ({type(exc).__name__})") from exc


def told(said: Any) -> dict[str, Any]:
    """What of a report the image keeps. Raises KeyError, TypeError or ValueError for what is no report."""
    outputs = {}
    for name, one in said["outputs"].items():
        if name not in METHODS or not DTYPE.fullmatch(one["dtype"]) or len(one["row"]) > 4:
            raise ValueError(name)
        outputs[name] = {"dtype": one["dtype"], "row": [int(n) for n in one["row"]]}
    if said["precision"] not in ("float32", "float64") or "predict" not in outputs:
        raise ValueError(said["precision"])
    return {"outputs": outputs, "precision": said["precision"], "columns": int(said["columns"]),
            "names": [str(name) for name in said["names"]],
            "rows": int(said["rows"]), "classes": None if said["classes"] is None else int(said["classes"]),
            "refusals": {str(k)[:40]: str(v)[:2000] for k, v in list(said["refusals"].items())[:10]}}
