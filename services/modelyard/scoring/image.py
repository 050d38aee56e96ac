"""What an image holds: ``image.json``, and where its models are. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import Invalid, NotFound


class Slot(NamedTuple):
    """An input or an output as metadata tells of it. -1 in ``shape``: any length; "" and (): not known."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """One model inside the image. ``path`` is the file or the folder; ``version`` is text, as the wire has it."""

    name: str
    version: str
    path: Path
    framework: str = ""
    framework_version: str = ""
    trusted: bool = False
    properties: Mapping[str, str] = field(default_factory=dict)
    signature: Mapping[str, Any] = field(default_factory=dict)
    """What it takes and gives, as its file or its registration says; empty: nobody does."""
    sample: Any = None
    """An input that it takes, as a body of ``/score``."""
    answers: Mapping[str, Any] = field(default_factory=dict)
    """Of a graph that was made of a scikit-learn model: what that gives and refuses."""

    @property
    def id(self) -> str:
        """``iris:4``."""
        return f"{self.name}:{self.version}"

    def slots(self, side: str) -> tuple[Slot, ...]:
        """The signature's ``inputs`` or ``outputs``."""
        return tuple(Slot(str(slot["name"]), str(slot.get("datatype") or ""), tuple(slot.get("shape") or ()))
                     for slot in self.signature.get(side) or ())


@dataclass(frozen=True)
class Image:
    """The unpacked image: its scoring file, if it has one, and its models."""

    root: Path
    score: Path | None
    models: tuple[Model, ...]

    @classmethod
    def read(cls, root: Path) -> Image:
        """Reads ``<root>/image.json``. Raises Invalid when it is missing or of a format that is not known."""
        try:
            body = json.loads((root / "image.json").read_bytes())
        except (OSError, ValueError) as exc:
            raise Invalid(f"{root / 'image.json'} cannot be read: {exc}") from exc
        if body.get("format") != 1:
            raise Invalid(f"{root / 'image.json'} is of format {body.get('format')}; this server knows format 1")
        models = tuple(_model(root, entry) for entry in body.get("models", ()))
        return cls(root, root / body["score"] if body.get("score") else None, models)

    def publish(self, env: Any = os.environ) -> None:
        """Sets ``AZUREML_MODEL_DIR``: the folder of the only model, or the one above all of them."""
        folder = self.root / "models"
        if len(self.models) == 1:
            folder = folder / self.models[0].name / self.models[0].version
        env["AZUREML_MODEL_DIR"] = str(folder)
        env["MODELYARD_ROOT"] = str(self.root)


def _model(root: Path, entry: Mapping[str, Any]) -> Model:
    return Model(entry["name"], str(entry["version"]), root / entry["path"], entry.get("framework") or "",
                 entry.get("framework_version") or "", entry.get("trusted") is True, entry.get("properties") or {},
                 entry.get("signature") or {}, entry.get("sample"), entry.get("answers") or {})


def model_path(name: str, version: int | str | None = None) -> str:
    """The path of a model's file or folder inside the image that this process runs from.

    Without ``version`` the highest that the image holds. Raises NotFound, naming what is there; outside an image
    (``MODELYARD_ROOT`` not set) as well.
    """
    root = os.environ.get("MODELYARD_ROOT")
    if not root:
        raise NotFound("there is no image here: MODELYARD_ROOT is not set; model_path works inside a deployment")
    models = Image.read(Path(root)).models
    fits = [m for m in models if m.name == name and (version is None or m.version == str(version))]
    if not fits:
        held = ", ".join(m.id for m in models) or "none"
        wanted = name if version is None else f"{name}:{version}"
        raise NotFound(f"the image holds no model '{wanted}'; it holds: {held}", kind="model", id=wanted)
    return str(max(fits, key=lambda m: int(m.version)).path)
