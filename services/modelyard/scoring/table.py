"""Who answers: names and versions → lanes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.errors import NotFound
from .calls import Served
from .image import Image, Model
from .lanes import Lane


@dataclass(frozen=True)
class Entry:
    """One answering model: what it is called in answers, and its lane."""

    version: str
    model: str
    lane: Lane


class Table:
    """Filled once, when the models are loaded.

    With a scoring file: the deployment's name, and the model's if the image holds one. Without one: each model under
    its own name, and under the deployment's if there is one model.
    """

    def __init__(self, deployment: str, image: Image, image_version: str,
                 lanes: Iterable[tuple[Sequence[Model], Lane]]) -> None:
        self.default = ""
        self._names: dict[str, dict[str, Entry]] = {}
        self._found: dict[tuple[str, str], tuple[Served, Entry]] = {}
        for models, lane in lanes:
            if image.score is not None:
                self._add_score(deployment, models, image_version, lane)
            else:
                self._add(models[0].name, Entry(models[0].version, models[0].id, lane))
        if len(image.models) == 1:
            self.default = image.models[0].name
            self._names.setdefault(deployment, dict(self._names[self.default]))
        if image.score is not None:
            self.default = deployment

    def _add_score(self, deployment: str, models: Sequence[Model], image_version: str, lane: Lane) -> None:
        if len(models) == 1:
            entry = Entry(models[0].version, models[0].id, lane)
            self._add(models[0].name, entry)
        else:
            entry = Entry(image_version or "1", deployment, lane)
        self._names[deployment] = {entry.version: entry}

    def _add(self, name: str, entry: Entry) -> None:
        self._names.setdefault(name, {})[entry.version] = entry

    def find(self, name: str, version: str = "") -> tuple[Served, Entry]:
        """The model meant; without a version the highest. Raises NotFound, naming what there is."""
        found = self._found.get((name, version))
        if found is None:
            found = self._found[name, version] = self._find(name, version)
        return found

    def _find(self, name: str, version: str) -> tuple[Served, Entry]:
        versions = self._names.get(name)
        if versions is None:
            raise NotFound(f"no model '{name}' answers here; these do: {', '.join(self.names)}", model=name)
        if version:
            entry = versions.get(version)
            if entry is None:
                raise NotFound(f"model '{name}' has no version '{version}' here; it has: {', '.join(versions)}",
                               model=name, version=version)
        else:
            entry = next(iter(versions.values())) if len(versions) == 1 else versions[self.versions(name)[-1]]
        return Served(name, entry.version, entry.model), entry

    @property
    def entries(self) -> list[Entry]:
        """All that answer; one that has several names more than once."""
        return [entry for versions in self._names.values() for entry in versions.values()]

    @property
    def names(self) -> list[str]:
        """Every name that answers, sorted."""
        return sorted(self._names)

    def versions(self, name: str) -> list[str]:
        """The versions under a name, lowest first; empty for an unknown name."""
        return sorted(self._names.get(name, ()), key=lambda v: (len(v), v))
