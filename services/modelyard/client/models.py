"""Models: register, find, tag, alias, download, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import Invalid
from .downloads import save
from .fields import ModelFields, Reference, reference
from .http import Http, Params, path
from .uploads import OnProgress, upload


def absent_dropped(**fields: Any) -> dict[str, Any]:
    """The fields that were given: None means not given."""
    return {k: v for k, v in fields.items() if v is not None}


def pairs(where: Mapping[str, str] | Sequence[str] | None) -> list[str] | None:
    """``{"team": "flora"}`` -> ``["team=flora"]``; a list of keys or ``k=v`` stays as it is."""
    if where is None:
        return None
    return [f"{k}={v}" for k, v in where.items()] if isinstance(where, Mapping) else list(where)


async def pages(http: Http, where: str, params: Params, limit: int | None) -> AsyncIterator[dict[str, Any]]:
    """Every document of a list route, page after page, up to ``limit``."""
    after: str | None = None
    left = limit
    while left is None or left > 0:
        size = 200 if left is None else min(left, 200)
        page = await http.json("GET", where, params={**params, "limit": size, "after": after})
        for item in page["items"]:
            yield item
        left = None if left is None else left - len(page["items"])
        after = page.get("next")
        if not after:
            return


class AsyncModel(ModelFields):
    """A registered model: what the server answered last, and what can be done with it."""

    def __init__(self, models: AsyncModels, document: dict[str, Any]) -> None:
        self._models = models
        self._document = document

    @property
    def document(self) -> dict[str, Any]:
        """The whole document, as GET answers it."""
        return self._document

    async def reload(self) -> AsyncModel:
        """Asks the server again. Raises NotFound when it was deleted."""
        self._document = (await self._models.get(self.id)).document
        return self

    async def update(
        self, *, tags: Mapping[str, str | None] | None = None, properties: Mapping[str, str] | None = None,
        description: str | None = None,
    ) -> AsyncModel:
        """As ``models.update``, on this version; the object shows the new state."""
        changed = await self._models.update(self, tags=tags, properties=properties, description=description)
        self._document = changed.document
        return self

    async def alias(self, alias: str) -> None:
        """Points ``<name>@<alias>`` at this version."""
        await self._models.alias(self, alias)

    async def download(self, to: str | Path = ".", *, on_progress: OnProgress | None = None) -> Path:
        """As ``models.download``, of this version."""
        return await self._models.download(self, to, on_progress=on_progress)

    async def delete(self) -> None:
        """As ``models.delete``, of this version."""
        await self._models.delete(self)


class AsyncModels:
    """The registry."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def register(
        self, name: str, path: str | Path, *, framework: str | None = None, framework_version: str | None = None,
        trusted: bool = False, tags: Mapping[str, str] | None = None, properties: Mapping[str, str] | None = None,
        description: str | None = None, signature: Mapping[str, Any] | None = None, sample: Any = None,
        parent: Reference | None = None, run: str | None = None, experiment: str | None = None,
        datasets: Sequence[Mapping[str, str]] | None = None, on_progress: OnProgress | None = None,
    ) -> AsyncModel:
        """Uploads a file or a folder and registers it as the next version of ``name``.

        ``framework`` is taken from the file's ending when absent (``.onnx``, ``.skops``, ``.joblib``, ``.ubj``,
        ``.pt``, ``.pt2``, a folder with ``MLmodel``). ``trusted`` says that loading the file may run code it holds
        (joblib, pickle, an exported program, MLflow's python_function) and that it is yours. ``signature`` is
        ``{"inputs": [{"name", "datatype", "shape"}], "outputs": […]}``, or MLflow's as a dict: needed only where the
        file has none. ``sample`` is an input as ``/score`` takes it: ``{"data": rows}``, rows, or columns; plain JSON.
        ``parent`` is the model it was made from. Raises Invalid with every problem at once.

        >>> model = yard.models.register("iris", "model.onnx", tags={"team": "flora"}, properties={"accuracy": "0.97"})
        >>> model.id
        'iris:1'
        """
        artifact = await upload(self._http, Path(path), on_progress)
        body = absent_dropped(
            name=name, artifact=artifact.digest, unpack=artifact.unpack or None,
            filename=None if artifact.unpack else artifact.filename,
            framework=framework or artifact.framework, framework_version=framework_version,
            trusted=trusted or None, tags=dict(tags) if tags else None,
            properties=dict(properties) if properties else None, description=description, signature=signature,
            sample=sample, parent=None if parent is None else reference(parent), run=run, experiment=experiment,
            datasets=datasets,
        )
        return await self.create(body)

    async def create(self, document: Mapping[str, Any]) -> AsyncModel:
        """Registers a model whose artifact lies in the registry already: the body of ``POST /v1/models``."""
        return AsyncModel(self, await self._http.json("POST", path("models"), json=dict(document)))

    async def get(self, model: Reference) -> AsyncModel:
        """``iris:4``, ``iris`` (the highest version) or ``iris@champion``. Raises NotFound.

        >>> yard.models.get("iris").version
        1
        """
        return AsyncModel(self, await self._http.json("GET", path("models", reference(model))))

    async def list(
        self, *, name: str | None = None, tags: Mapping[str, str] | Sequence[str] | None = None,
        properties: Mapping[str, str] | Sequence[str] | None = None, framework: str | None = None,
        run: str | None = None, latest: bool = False, order: str | None = None, limit: int | None = None,
    ) -> list[AsyncModel]:
        """Models that match every term, the newest first. ``tags`` is a map, or a list of ``k`` and ``k=v``.

        >>> [m.id for m in yard.models.list(tags={"team": "flora"})]
        ['iris:1']
        """
        params: Params = {
            "name": name, "tag": pairs(tags), "property": pairs(properties), "framework": framework, "run": run,
            "latest": latest or None, "order": order,
        }
        return [AsyncModel(self, d) async for d in pages(self._http, path("models"), params, limit)]

    async def update(
        self, model: Reference, *, tags: Mapping[str, str | None] | None = None,
        properties: Mapping[str, str] | None = None, description: str | None = None,
    ) -> AsyncModel:
        """Sets tags (None takes one away), adds properties (never changes one), sets the description.

        >>> yard.models.update("iris:1", tags={"stage": "trial"}).tags["stage"]
        'trial'
        """
        patch = absent_dropped(tags=tags, properties=properties, description=description)
        return AsyncModel(self, await self._http.json("PATCH", path("models", reference(model)), json=patch))

    async def alias(self, model: Reference, alias: str) -> None:
        """Points ``<name>@<alias>`` at an exact version, moving it when it is there.

        >>> yard.models.alias("iris:1", "champion")
        >>> yard.models.get("iris@champion").id
        'iris:1'
        """
        name, _, version = reference(model).rpartition(":")
        if not version.isdigit():
            raise Invalid(f"an alias names an exact version; write {reference(model)}:1", field="model")
        body = {"version": int(version)}
        await self._http.json("PUT", path("models", name, "aliases", alias), json=body)

    async def unalias(self, name: str, alias: str) -> None:
        """Takes the alias away; one that is not there is fine."""
        await self._http.send("DELETE", path("models", name, "aliases", alias))

    async def delete(self, model: Reference) -> None:
        """Deletes one version. Raises InUse with ``blockers`` while an image or an alias needs it; a model that
        is not there is fine."""
        await self._http.send("DELETE", path("models", reference(model)))

    async def download(
        self, model: Reference, to: str | Path = ".", *, exist_ok: bool = False, on_progress: OnProgress | None = None,
    ) -> Path:
        """Writes the artifact into the folder ``to`` and returns the path: a file under its own name, a folder model
        as the folder ``<name>-<version>``. Raises Conflict when that is there already; ``exist_ok`` replaces a
        file, never a folder."""
        found = await self.get(model)
        folder, fallback = bool(found.document.get("unpack")), f"{found.name}-{found.version}"
        target = Path(to) / (fallback if folder else found.document.get("filename") or fallback)
        return await save(
            self._http, path("models", found.id, "content"), target, replace=exist_ok, folder=folder,
            digest=found.artifact, size=int(found.document.get("size") or 0), on_progress=on_progress)
