"""modelyard deployments …"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .fields import Set, with_set
from .guard import usage
from .options import (
    DeploymentRef,
    Description,
    Env,
    Limit,
    Output,
    Tags,
    Wait,
    Where,
    changed_tags,
    command,
    connect,
    group,
    names,
    pairs,
)
from .show import Column, Format, Steps, document, documents

if TYPE_CHECKING:
    from ..client import Deployment

app = group("Run images: create, change, scale, roll back, watch, delete.")
COLUMNS: list[Column] = [
    "id", "phase", "image", "models", ("ready", lambda d: f"{d.get('replicas_ready') or 0}/{d.get('replicas') or 1}"),
    ("rest", lambda d: (d.get("endpoints") or {}).get("rest")),
    ("grpc", lambda d: (d.get("endpoints") or {}).get("grpc")),
]
ImageOption = Annotated[str | None, typer.Option(
    "--image", "-i", help="iris-scorer:7, or iris-scorer.", autocompletion=names("images"))]
CaptureOption = Annotated[bool | None, typer.Option("--capture/--no-capture", help="Record every call.")]
Sampling = Annotated[float | None, typer.Option(min=0, max=1, help="Record this share of the calls that succeed.")]
Replicas = Annotated[int | None, typer.Option(min=1, help="How many replicas.")]
Cpu = Annotated[float | None, typer.Option(help="Cores for one replica.")]
Memory = Annotated[str | None, typer.Option(help="Memory for one replica: 512Mi.")]
Timeout = Annotated[int | None, typer.Option(min=1, help="Milliseconds that a call may take.")]
Deadline = Annotated[int | None, typer.Option(min=1, help="Seconds that a generation has to become healthy.")]


def asked(
    capture: bool | None, sampling: float | None, cpu: float | None, memory: str | None, timeout_ms: int | None,
) -> dict[str, Any]:
    """The parts of a document that these options ask for."""
    parts: dict[str, Any] = {}
    if capture is not None or sampling is not None:
        parts["capture"] = {"enabled": True if capture is None else capture}
        if sampling is not None:
            parts["capture"]["sampling"] = sampling
    resources = {k: v for k, v in (("cpu", cpu), ("memory", memory)) if v is not None}
    return parts | ({"resources": resources} if resources else {}) | (
        {"limits": {"timeout_ms": timeout_ms}} if timeout_ms else {})


def settled(service: Deployment, wait: bool, what: str, output: Format) -> None:
    """Waits if asked to, then prints the deployment."""
    with Steps() as steps:
        if wait:
            steps.start(f"{what} {service.name}")
            service.wait(on_progress=steps)
        steps.done(f"{service.name} generation {service.generation} is {service.phase}")
    document(service.document, output, "Deployment")


@command(app, "create", "modelyard deployments create iris --image iris-scorer:7 --replicas 2 --capture")
def create(
    name: Annotated[str, typer.Argument(help="3-32 lower-case letters, digits and '-'.")], image: ImageOption = None,
    target: Annotated[str, typer.Option(help="Where it runs: a name in the settings.")] = "local",
    replicas: Replicas = None, capture: CaptureOption = None, sampling: Sampling = None, cpu: Cpu = None,
    memory: Memory = None, env: Env = None, timeout_ms: Timeout = None, progress_deadline: Deadline = None,
    set: Set = None, tag: Tags = None, description: Description = None, wait: Wait = True,
    output: Output = Format.table,
) -> None:
    """Runs an image."""
    if image is None:
        usage("say which image: --image iris-scorer:7")
    more = {"image": image, "target": target, "replicas": replicas, "env": pairs(env, "--env"),
            "tags": pairs(tag, "--tag"), "description": description, "progress_deadline_s": progress_deadline}
    fields = {k: v for k, v in more.items() if v is not None} | asked(capture, sampling, cpu, memory, timeout_ms)
    with_set(fields, set)
    with connect() as yard:
        service = yard.deployments.create(name, **fields)
        settled(service, wait, "deploying", output)


@command(app, "list", "modelyard deployments list --model iris:4")
def list_(
    model: Annotated[str | None, typer.Option(help="Only those that serve this model.")] = None,
    image: Annotated[str | None, typer.Option(help="Only those that run this image.")] = None,
    target: Annotated[str | None, typer.Option(help="Only those on this target.")] = None,
    tag: Where = None, limit: Limit = None, output: Output = Format.table,
) -> None:
    """Deployments: which ones serve this model, or run this image?"""
    with connect() as yard:
        found = yard.deployments.list(model=model, image=image, target=target, tags=tag, limit=limit)
    documents([d.document for d in found], COLUMNS, output, "Deployment")


@command(app, "show", "modelyard deployments show iris --output json")
def show(name: DeploymentRef, output: Output = Format.table) -> None:
    """One deployment, in full: addresses, replicas, conditions."""
    with connect() as yard:
        document(yard.deployments.get(name).document, output, "Deployment")


@command(app, "update", """
modelyard deployments update iris --image iris-scorer:8 --wait
modelyard deployments update iris --set limits.max_queue=1024 --set capture.redact=[name,card]""")
def update(
    name: DeploymentRef, image: ImageOption = None, replicas: Replicas = None, capture: CaptureOption = None,
    sampling: Sampling = None, cpu: Cpu = None, memory: Memory = None, env: Env = None, timeout_ms: Timeout = None,
    progress_deadline: Deadline = None, set: Set = None, tag: Tags = None, description: Description = None,
    if_generation: Annotated[int | None, typer.Option(min=1, help="Only if this is still its generation.")] = None,
    wait: Wait = False, output: Output = Format.table,
) -> None:
    """Changes what is given, keeps the rest; a new generation rolls in without a failed call."""
    more = {"image": image, "replicas": replicas, "env": pairs(env, "--env"), "tags": changed_tags(tag),
            "description": description, "progress_deadline_s": progress_deadline}
    changes = {k: v for k, v in more.items() if v is not None} | asked(capture, sampling, cpu, memory, timeout_ms)
    if not with_set(changes, set):
        usage("say what to change, for example --image iris-scorer:8")
    with connect() as yard:
        service = yard.deployments.update(name, if_generation=if_generation, **changes)
        settled(service, wait, "updating", output)


@command(app, "scale", "modelyard deployments scale iris 3")
def scale(
    name: DeploymentRef, replicas: Annotated[int, typer.Argument(min=1, help="How many.")], wait: Wait = False,
    output: Output = Format.table,
) -> None:
    """Sets the number of replicas."""
    with connect() as yard:
        settled(yard.deployments.scale(name, replicas), wait, "scaling", output)


@command(app, "rollback", "modelyard deployments rollback iris --to 3 --wait")
def rollback(
    name: DeploymentRef,
    to: Annotated[int | None, typer.Option(min=1, help="The generation; absent: the last healthy one.")] = None,
    wait: Wait = False, output: Output = Format.table,
) -> None:
    """Writes a new generation, copied from an earlier one."""
    with connect() as yard:
        settled(yard.deployments.rollback(name, to), wait, "rolling back", output)


@command(app, "restart", "modelyard deployments restart iris --wait")
def restart(name: DeploymentRef, wait: Wait = False, output: Output = Format.table) -> None:
    """Replaces every replica by a fresh one, without a failed call."""
    with connect() as yard:
        settled(yard.deployments.restart(name), wait, "restarting", output)


@command(app, "history", "modelyard deployments history iris")
def history(name: DeploymentRef, output: Output = Format.table) -> None:
    """The last ten generations, the newest first."""
    with connect() as yard:
        found = yard.deployments.history(name)
    documents(found, ["generation", "image", "models", "healthy", "reason", "time"], output)


@command(app, "wait", "modelyard deployments wait iris --timeout 120")
def wait(
    name: DeploymentRef, timeout: Annotated[float | None, typer.Option(min=0, help="Seconds.")] = None,
    output: Output = Format.table,
) -> None:
    """Waits until the newest generation is healthy; exit 1 if it was given up."""
    with connect() as yard, Steps() as steps:
        steps.start(f"waiting for {name}")
        service = yard.deployments.get(name).wait(timeout, on_progress=steps)
    document(service.document, output, "Deployment")


@command(app, "log", "modelyard deployments log iris --tail 50 --follow")
def log(
    name: DeploymentRef,
    tail: Annotated[int, typer.Option("--tail", "-n", min=0, help="The last so many lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And those that come.")] = False,
) -> None:
    """What the replicas wrote."""
    with connect() as yard:
        for line in yard.deployments.log(name, tail=tail, follow=follow):
            print(line, flush=follow)


@command(app, "delete", "modelyard deployments delete iris")
def delete(name: DeploymentRef, wait: Wait = True) -> None:
    """Drains and stops it."""
    with connect() as yard, Steps() as steps:
        steps.start(f"removing {name}")
        yard.deployments.delete(name, wait_s=120.0 if wait else 0.0)
    print(f"{name} is {'gone' if wait else 'going'}")
