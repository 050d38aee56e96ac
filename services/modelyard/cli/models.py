"""modelyard models …"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Description,
    Limit,
    ModelRef,
    Output,
    Properties,
    TagChanges,
    Tags,
    Where,
    changed_tags,
    command,
    connect,
    group,
    pairs,
    read_json,
)
from .show import Column, Format, Steps, document, documents, size

app = group("Register, find, tag, alias, download and delete models.")
COLUMNS: list[Column] = [
    "id", "framework", "tags", "properties", ("size", lambda d: size(int(d.get("size") or 0))), "created"]


@command(app, "register", "modelyard models register iris model.skops --tag team=flora --property accuracy=0.97")
def register(
    name: Annotated[str, typer.Argument(help="The model's name; the registry gives the version.")],
    path: Annotated[Path, typer.Argument(exists=True, help="A file, or a folder (kept as a folder).")],
    framework: Annotated[str | None, typer.Option(help="scikit-learn, onnx …; told by the ending if absent.")] = None,
    framework_version: Annotated[str | None, typer.Option(help="For example 1.9.1.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="The file may run code when it is loaded (joblib, pickle), "
                                                        "and it is yours.")] = False,
    tag: Tags = None, property: Properties = None, description: Description = None,
    signature: Annotated[str | None, typer.Option(
        metavar="JSON", help='What it takes and gives, where its file does not say: {"inputs": [{"name": "x", '
                             '"datatype": "FP32", "shape": [-1, 4]}], "outputs": […]}; @FILE reads a file.')] = None,
    sample: Annotated[str | None, typer.Option(
        metavar="JSON", help='An input that it takes, as modelyard score takes it: {"data": [[5.1, 3.5, 1.4, 0.2]]}; '
                             "@FILE reads a file.")] = None,
    parent: Annotated[str | None, typer.Option(help="The model it was made from: iris:3.")] = None,
    run: Annotated[str | None, typer.Option(help="The training run.")] = None,
    experiment: Annotated[str | None, typer.Option(help="The experiment.")] = None,
    output: Output = Format.table,
) -> None:
    """Uploads a file or a folder and registers it as the next version."""
    said, given = (read_json(text, name) if text is not None else None
                   for text, name in ((signature, "--signature"), (sample, "--sample")))
    with connect() as yard, Steps() as steps:
        steps.start(f"registering {name}")
        model = yard.models.register(
            name, path, framework=framework, framework_version=framework_version, trusted=trust,
            tags=pairs(tag, "--tag"), properties=pairs(property, "--property"), description=description,
            signature=said, sample=given, parent=parent, run=run, experiment=experiment, on_progress=steps)
        steps.done(f"registered {model.id}")
    document(model.document, output, "Model")


@command(app, "list", "modelyard models list --tag team=flora --latest")
def list_(
    name: Annotated[str | None, typer.Option(help="Only of this name.")] = None, tag: Where = None,
    property: Annotated[list[str] | None, typer.Option(metavar="K[=V]", help="Only with this property.")] = None,
    framework: Annotated[str | None, typer.Option(help="Only of this framework.")] = None,
    run: Annotated[str | None, typer.Option(help="Only of this training run.")] = None,
    latest: Annotated[bool, typer.Option("--latest", help="Only the highest version of each name.")] = False,
    limit: Limit = None, output: Output = Format.table,
) -> None:
    """Models, the newest first."""
    with connect() as yard:
        found = yard.models.list(
            name=name, tags=tag, properties=property, framework=framework, run=run, latest=latest, limit=limit)
    documents([m.document for m in found], COLUMNS, output, "Model")


@command(app, "show", "modelyard models show iris@champion --output yaml")
def show(model: ModelRef, output: Output = Format.table) -> None:
    """One version, in full."""
    with connect() as yard:
        document(yard.models.get(model).document, output, "Model")


@command(app, "tag", "modelyard models tag iris:4 stage=trial old-")
def tag(model: ModelRef, tags: TagChanges, output: Output = Format.table) -> None:
    """Sets tags and takes them away."""
    with connect() as yard:
        document(yard.models.update(model, tags=changed_tags(tags)).document, output, "Model")


@command(app, "update", "modelyard models update iris:4 --property reviewed=yes --description 'the first good one'")
def update(model: ModelRef, tag: Tags = None, property: Properties = None, description: Description = None,
           output: Output = Format.table) -> None:
    """Sets tags and the description, adds properties (never changes one)."""
    with connect() as yard:
        changed = yard.models.update(
            model, tags=changed_tags(tag), properties=pairs(property, "--property"), description=description)
        document(changed.document, output, "Model")


@command(app, "alias", "modelyard models alias iris:4 champion")
def alias(model: ModelRef, alias: Annotated[str, typer.Argument(help="champion, for example.")]) -> None:
    """Points NAME@ALIAS at an exact version."""
    with connect() as yard:
        yard.models.alias(model, alias)
    print(f"{model.rpartition(':')[0]}@{alias} is {model}")


@command(app, "unalias", "modelyard models unalias iris champion")
def unalias(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    alias: Annotated[str, typer.Argument(help="The alias to take away.")],
) -> None:
    """Takes an alias away."""
    with connect() as yard:
        yard.models.unalias(name, alias)
    print(f"{name}@{alias} is gone")


@command(app, "download", "modelyard models download iris:4 --to ./models")
def download(
    model: ModelRef, to: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Writes the model's file or folder; prints where."""
    with connect() as yard, Steps() as steps:
        steps.start(f"downloading {model}")
        path = yard.models.download(model, to, exist_ok=force, on_progress=steps)
    print(path)


@command(app, "delete", "modelyard models delete iris:3")
def delete(model: ModelRef) -> None:
    """Deletes one version; refused while an image or an alias needs it."""
    with connect() as yard:
        yard.models.delete(model)
    print(f"{model} is gone")
