"""modelyard deploy: register, build, deploy and wait, in one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .fields import Set, with_set
from .folder import Found, found
from .images import built
from .options import Base, Env, Output, Tags, connect, pairs
from .show import Format, Steps, document
from .signature import score_line

if TYPE_CHECKING:
    from ..client import Client, Deployment, Image
    from ..client.requirements import Needs

UNKNOWN_INPUT = '{"data": [[…]]}'


def deploy(
    path: Annotated[Path, typer.Argument(exists=True, help="A folder with score.py, requirements.txt (pyproject.toml, "
                                                           "environment.yml) and the model's files; or one .onnx, "
                                                           ".skops, .pt or .joblib file or MLflow folder.")],
    name: Annotated[str, typer.Option("--name", "-n", help="The deployment's name, and the model's and image's.")],
    model: Annotated[str | None, typer.Option(help="Another name for the model.")] = None,
    image: Annotated[str | None, typer.Option(help="Another name for the image.")] = None,
    target: Annotated[str, typer.Option(help="Where it runs: a name in the settings.")] = "local",
    base: Base = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="How many replicas.")] = None,
    capture: Annotated[bool, typer.Option("--capture/--no-capture", help="Record every call.")] = True,
    trust: Annotated[bool, typer.Option("--trust", help="A joblib or pickle file may run code when it is loaded, and "
                                                        "it is yours.")] = False,
    env: Env = None, set: Set = None, tag: Tags = None, output: Output = Format.table,
) -> None:
    """Registers, builds, deploys and waits. Run again after a change, it upgrades without a failed call; what did
    not change is not made again. In a folder every .py file is code, the rest is the model: in score.py,
    modelyard.model_path(NAME) is its file, or its folder if there are several files."""
    public, tags = pairs(env, "--env"), pairs(tag, "--tag")
    wanted = with_set({"capture": {"enabled": capture}, **({"replicas": replicas} if replicas else {}),
                       **({"env": public} if public else {})}, set)
    with connect() as yard, Steps() as steps:
        with found(path, trust) as parts:
            needs = _look(model or name, image or name, name, parts, base, {"target": target, **wanted})
            if parts.requirements is not None and parts.unread:
                steps.done(f"dependencies are read from {parts.requirements.name}, not from {', '.join(parts.unread)}")
            models = []
            if parts.model is not None:
                models.append(_register(yard, steps, model or name, parts.model, trust, tags))
            made = _build(yard, steps, image or name, models, parts.score, needs, base)
        service = _run(yard, steps, name, made.id, target, wanted)
    if output is not Format.table:
        document(service.document, output, "Deployment")
    else:
        _tell(service, next(iter(made.samples.values()), None))


def _look(
    model: str, image: str, name: str, parts: Found, base: str | None, deployment: dict[str, Any],
) -> Needs:
    """All that can be wrong here, before anything is made there, and the dependencies, which are read for it. Raises
    Invalid with every problem of a document."""
    from ..client.apply import checked
    from ..client.requirements import read_requirements

    needs = read_requirements(parts.requirements)
    if parts.model is not None:
        checked("Model", {"name": model, "artifact": f"sha256:{'0' * 64}"})
    checked("Image", {"name": image, "requirements": needs.requirements or [], "base": base})
    checked("Deployment", {"image": f"{image}:1", **deployment, "name": name})
    return needs


def _register(
    yard: Client, steps: Steps, name: str, path: Path, trust: bool, tags: dict[str, str] | None,
) -> str:
    steps.start(f"registering {name}")
    wanted: dict[str, Any] = {"kind": "Model", "name": name, "path": str(path.resolve()), "trusted": trust}
    (change,) = yard.apply([{**wanted, "tags": tags or {}}], on_progress=steps)
    steps.done(f"model {change.id}{' (as it was)' if change.action == 'unchanged' else ''}")
    return change.id


def _build(
    yard: Client, steps: Steps, name: str, models: list[str], score: Path | None, needs: Needs,
    base: str | None,
) -> Image:
    steps.start(f"building {name}")
    wanted: dict[str, Any] = {"kind": "Image", "name": name, "models": models, **({"base": base} if base else {})}
    if score is not None:
        wanted["score"] = str(score.resolve())
    read = {"requirements": needs.requirements, "constraints": needs.constraints, "python": needs.python}
    wanted |= {field: value for field, value in read.items() if value is not None}
    (change,) = yard.apply([wanted], on_progress=steps)
    image = built(yard, yard.images.get(change.id), steps)
    steps.done(f"image {image.id}{' (as it was)' if change.action == 'unchanged' else ''}")
    return image


def _run(
    yard: Client, steps: Steps, name: str, image: str, target: str, wanted: dict[str, Any],
) -> Deployment:
    from ..core.errors import NotFound

    steps.start(f"deploying {name}")
    try:
        yard.deployments.get(name)
    except NotFound:
        service = yard.deployments.create(name, image=image, target=target, **wanted)
    else:
        service = yard.deployments.update(name, image=image, **wanted)
    service.wait(on_progress=steps)
    steps.done(f"deployment {name} is {service.phase}, {service.replicas_ready} ready")
    return service


def _tell(service: Deployment, sample: Any) -> None:
    ends = service.endpoints
    print(f"REST  {ends.get('rest')}/score")
    print(f"gRPC  {ends.get('grpc')}")
    example = f"modelyard score {service.name} --data '{_example(ends.get('rest', ''), service.name)}'" \
        if sample is None else score_line(service.name, sample)
    print(f"try   {example}", flush=True)


def _example(rest: str, name: str) -> str:
    """Zeros of the shape that the model declares; dots where it declares none."""
    import urllib.request

    try:
        with urllib.request.urlopen(f"{rest}/v2/models/{name}", timeout=5) as answer:
            inputs = json.load(answer).get("inputs") or []
    except (OSError, ValueError) as exc:
        print(f"(its inputs cannot be asked for: {exc})", file=sys.stderr)
        return UNKNOWN_INPUT
    shape = inputs[0].get("shape") or [] if len(inputs) == 1 else []
    if len(shape) == 2 and 0 < int(shape[1]) <= 100:
        return json.dumps({"data": [[0] * int(shape[1])]})
    return UNKNOWN_INPUT
