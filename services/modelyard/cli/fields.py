"""``--set``: any field of a document by its path, for what has no option of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .guard import usage


def paths(incomplete: str) -> list[str]:
    """Tab completion: what a deployment's document can be told, each with its ``=``."""
    from pydantic import BaseModel

    from ..core.specs import DeploymentSpec

    def below(spec: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in spec.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from below(kind, f"{prefix}{name}.")
            elif name != "name":
                yield f"{prefix}{name}="

    return [path for path in below(DeploymentSpec, "") if path.startswith(incomplete)]


Set = Annotated[list[str] | None, typer.Option(
    "--set", metavar="FIELD=VALUE", autocompletion=paths,
    help="Any other field of the document, its value as in YAML: limits.max_queue=1024, capture.redact=[name,card], "
         "capture.on_pressure=block; repeat for more. null takes away what was set.")]


def with_set(parts: dict[str, Any], given: list[str] | None) -> dict[str, Any]:
    """``parts`` of a document and what ``--set`` says: ``["limits.max_queue=9"]`` → ``{"limits": {"max_queue": 9}}``.
    What is no FIELD=VALUE, or contradicts another option, is a usage error."""
    if not given:
        return parts
    import yaml

    from ..core.specs import DeploymentSpec

    for text in given:
        path, equals, value = text.partition("=")
        *above, last = path.split(".")
        if not equals or not all((*above, last)):
            usage(f"--set needs FIELD=VALUE, such as limits.max_queue=1024, not '{text}'")
        known = [name for name in DeploymentSpec.model_fields if name != "name"]
        if (first := [*above, last][0]) not in known:
            usage(f"--set {path}: a deployment has no field '{first}'; it has {', '.join(known)}")
        place = parts
        for name in above:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                usage(f"--set {path}: '{name}' was given a value already")
        if last in place:
            usage(f"--set {path}: it was given already")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            usage(f"--set {path}: '{value}' is no value in YAML; put text with special characters into quotes")
    return parts
