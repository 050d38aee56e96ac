"""What a POST must hold before there is an image: every problem of the request, found without building."""

from __future__ import annotations

import asyncio
import platform as machine
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import Invalid, ModelyardError
from ..core.requirements import constraint, requirement
from ..core.specs import ImageSpec
from ..kernel.service import Context
from . import sources
from .bases import reference
from .checks import flavour
from .dockerfiles import NO_BUILDER
from .model import ModelInput

MACHINES = {"x86_64": "linux/amd64", "amd64": "linux/amd64", "aarch64": "linux/arm64", "arm64": "linux/arm64"}
Wrong = Callable[[str, str], None]
"""Notes a problem: field, message."""


@dataclass(frozen=True)
class Resolved:
    """A request whose references were looked up: exact models, a platform, and a Python unless its base decides."""

    models: list[ModelInput]
    python: str | None
    platform: str


def own_python() -> str:
    """The minor version that runs Modelyard: ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def own_platform() -> str:
    """Of this machine: ``linux/amd64``. Invalid on a machine that images cannot be built for."""
    found = MACHINES.get(machine.machine().lower())
    if found is None:
        raise Invalid(f"images are built for x86-64 and arm64; this machine is {machine.machine()}: give platform",
                      field="platform")
    return found


async def resolve(ctx: Context, spec: ImageSpec, workspace: str) -> Resolved:
    """Looks up every reference. Invalid with all problems at once; Unavailable when the registry is away."""
    errors: list[dict[str, str]] = []

    def wrong(field: str, message: str) -> None:
        errors.append({"field": field, "message": message})

    models = await _models(ctx, spec, workspace, wrong)
    await _artifacts(ctx, spec, workspace, wrong)
    if not spec.models and spec.score is None:
        wrong("models", "an image needs a model or a scoring file")
    _served(spec, models, wrong)
    for field, lines, check in (("requirements", spec.requirements, requirement),
                                ("constraints", spec.constraints, constraint)):
        for number, line in enumerate(lines):
            _, why = check(line)
            if why:
                wrong(f"{field}.{number}", why)
    if spec.lock and (spec.requirements or spec.constraints):
        wrong("lock", "give requirements or a lock, not both: a lock is used as it is")
    platform = spec.platform or own_platform()
    python = spec.python or (own_python() if spec.base is None and spec.dockerfile is None else None)
    _base(spec, python, platform, wrong)
    if spec.dockerfile is not None and ctx.dockerfiles is None:
        wrong("dockerfile", NO_BUILDER)
    if errors:
        raise Invalid("; ".join(f"{e['field']}: {e['message']}" for e in errors), errors=errors)
    return Resolved([m for m in models if m is not None], python, platform)


async def _models(ctx: Context, spec: ImageSpec, workspace: str, wrong: Wrong) -> list[ModelInput | None]:
    found = await asyncio.gather(*(_model(ctx, ref, workspace) for ref in spec.models))
    out: list[ModelInput | None] = []
    for number, (ref, answer) in enumerate(zip(spec.models, found, strict=True)):
        field = f"models.{number}"
        if isinstance(answer, str):
            wrong(field, answer)
            out.append(None)
            continue
        same = next((m for m in out if m is not None and m.name == answer.name), None)
        if same is not None and (same.version == answer.version or spec.score is None):
            wrong(field, f"'{ref}' is {answer.id}, and {same.id} is in the list already")
        out.append(answer)
    return out


async def _model(ctx: Context, ref: str, workspace: str) -> ModelInput | str:
    try:
        found = await sources.resolve_model(ctx, ref, workspace)
    except ModelyardError as exc:
        if exc.retryable:
            raise
        return exc.message
    return f"there is no model '{ref}'" if found is None else ModelInput.model_validate(
        found, extra="ignore")


async def _artifacts(ctx: Context, spec: ImageSpec, workspace: str, wrong: Wrong) -> None:
    for field, digest in (("score", spec.score), ("lock", spec.lock), ("dockerfile", spec.dockerfile)):
        if digest and not await sources.has_artifact(ctx, digest, workspace):
            wrong(field, f"{digest} is not here; upload it first: PUT /v1/artifacts/{digest}")


def _served(spec: ImageSpec, models: list[ModelInput | None], wrong: Wrong) -> None:
    if spec.score is not None:
        return
    for number, model in enumerate(models):
        why = flavour(model)[1] if model is not None else ""
        if model is not None and why:
            wrong(f"models.{number}", f"{model.id} {why}")


def _base(spec: ImageSpec, python: str | None, platform: str, wrong: Wrong) -> None:
    if spec.base is not None and spec.dockerfile is not None:
        wrong("dockerfile", "give a base or a Dockerfile, not both: the Dockerfile's FROM names what it stands on")
    if spec.dockerfile is not None:
        return
    if spec.base is not None:
        try:
            reference(spec.base)
        except Invalid as exc:
            wrong("base", exc.message)
        return
    if python != own_python():
        wrong("python", f"an image without a base runs on the Python that runs Modelyard, {own_python()}, not on "
                        f"{python}; leave python away, or run Modelyard on that version")
    if platform != own_platform():
        wrong("platform", f"an image without a base runs on this machine, {own_platform()}, not {platform}")
