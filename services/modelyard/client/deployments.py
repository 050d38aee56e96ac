"""Deployments: create, change, scale, roll back, restart, wait, score, read the log, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..core.errors import ModelyardError, NotFound
from .fields import DeploymentFields, Reference, reference
from .http import Http, Params, path
from .models import absent_dropped, pages, pairs
from .scoring import Answer, AsyncScorer, Data
from .uploads import OnProgress, Progress
from .waiting import reason_of, settle

if TYPE_CHECKING:
    from .inference import AsyncScoringClient

CaptureChoice = bool | Mapping[str, Any]
"""True and False switch capture on and off; a map is the document's ``capture`` part."""


def capture_part(choice: CaptureChoice | None) -> dict[str, Any] | None:
    """``True`` -> ``{"enabled": True}``; a map that does not say is switched on."""
    if choice is None:
        return None
    return {"enabled": choice} if isinstance(choice, bool) else {"enabled": True, **choice}


class AsyncDeployment(DeploymentFields):
    """A deployment: what the server answered last, and what can be done with it."""

    def __init__(self, deployments: AsyncDeployments, document: dict[str, Any]) -> None:
        self._deployments = deployments
        self._document = document

    @property
    def document(self) -> dict[str, Any]:
        """The whole document, as GET answers it."""
        return self._document

    async def reload(self) -> AsyncDeployment:
        """Asks the server again."""
        self._document = (await self._deployments.get(self.id)).document
        return self

    async def wait(self, timeout_s: float | None = None, *, on_progress: OnProgress | None = None) -> AsyncDeployment:
        """Returns when the newest generation is healthy. ``timeout_s``: its progress deadline and 30 s more.

        Raises ModelyardError with ``code="deployment-failed"`` and the reason when the generation was given up
        (an older one may serve on), Unavailable with ``code="timeout"``.
        """
        limit = timeout_s if timeout_s is not None else float(self._document.get("progress_deadline_s") or 600) + 30
        self._document = await self._deployments.settled(self.id, limit, on_progress)
        return self

    async def score(self, data: Data, *, protocol: str = "rest", timeout_s: float = 60.0) -> Answer:
        """As ``deployments.score``."""
        return await self._deployments.score(self, data, protocol=protocol, timeout_s=timeout_s)

    def client(self, **options: Any) -> AsyncScoringClient:
        """A scoring client for this deployment, for many calls and for streams: ``infer``, ``infer_many``. ``options``
        as ``ScoringClient`` has them; ``model`` is the deployment's name unless it says otherwise, ``connections`` at
        least the replicas that it has now. It has connections of its own: close it. Raises Unavailable when the
        deployment has no address yet."""
        from .inference import AsyncScoringClient

        return AsyncScoringClient(self.grpc_address, **self._terms(options))

    def _terms(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a scoring client, with what this deployment makes of those that are not given."""
        from .inference import CONNECTIONS

        enough = max(CONNECTIONS, int(self._document.get("replicas") or 0))
        return {"model": self.id, "connections": enough, **options}

    async def update(self, /, **changes: Any) -> AsyncDeployment:
        """As ``deployments.update``; the object shows the new state."""
        self._document = (await self._deployments.update(self, **changes)).document
        return self

    async def scale(self, replicas: int) -> AsyncDeployment:
        """As ``deployments.scale``; the object shows the new state."""
        return await self.update(replicas=replicas)

    async def rollback(self, generation: int | None = None) -> AsyncDeployment:
        """As ``deployments.rollback``; the object shows the new state."""
        self._document = (await self._deployments.rollback(self, generation)).document
        return self

    async def restart(self) -> AsyncDeployment:
        """As ``deployments.restart``; the object shows the new state."""
        self._document = (await self._deployments.restart(self)).document
        return self

    async def delete(self, *, wait_s: float = 60.0) -> None:
        """As ``deployments.delete``."""
        await self._deployments.delete(self, wait_s=wait_s)


class AsyncDeployments:
    """The deployer."""

    def __init__(self, http: Http) -> None:
        self._http = http
        self._scorers: dict[str, AsyncScorer] = {}

    async def create(
        self, name: str, *, image: Reference | None = None, traffic: Sequence[Mapping[str, Any]] | None = None,
        target: str = "local", replicas: int | None = None, autoscale: Mapping[str, int] | None = None,
        capture: CaptureChoice | None = None, resources: Mapping[str, Any] | None = None,
        limits: Mapping[str, int] | None = None, env: Mapping[str, str] | None = None,
        secrets: Mapping[str, Mapping[str, str]] | None = None, tags: Mapping[str, str] | None = None,
        description: str | None = None, progress_deadline_s: int | None = None,
    ) -> AsyncDeployment:
        """Asks for a new deployment and returns at once; ``wait`` on the answer. Raises Conflict when the name is
        taken, Invalid with every problem of the request.

        >>> service = yard.deployments.create("iris", image=image, target="local", capture=True).wait()
        >>> service.phase
        'healthy'
        >>> service.score([[5.1, 3.5, 1.4, 0.2]])["label"]
        [0]
        """
        body = absent_dropped(
            name=name, image=None if image is None else reference(image), traffic=traffic, target=target,
            replicas=replicas, autoscale=autoscale, capture=capture_part(capture), resources=resources, limits=limits,
            env=env, secrets=secrets, tags=tags, description=description, progress_deadline_s=progress_deadline_s,
        )
        return AsyncDeployment(self, await self._http.json("POST", path("deployments"), json=body))

    async def put(self, document: Mapping[str, Any]) -> AsyncDeployment:
        """Creates or replaces by the whole document; an equal one changes nothing."""
        where = path("deployments", str(document["name"]))
        return AsyncDeployment(self, await self._http.json("PUT", where, json=dict(document)))

    async def get(self, name: Reference) -> AsyncDeployment:
        """Raises NotFound.

        >>> yard.deployments.get("iris").image
        'iris-scorer:1'
        """
        return AsyncDeployment(self, await self._http.json("GET", path("deployments", reference(name))))

    async def list(
        self, *, model: Reference | None = None, image: Reference | None = None, target: str | None = None,
        tags: Mapping[str, str] | Sequence[str] | None = None, limit: int | None = None,
    ) -> list[AsyncDeployment]:
        """Deployments that match every term: which ones serve this model, or run this image?

        >>> [d.id for d in yard.deployments.list(model="iris:1")]
        ['iris']
        """
        params: Params = {
            "model": None if model is None else reference(model), "image": None if image is None else reference(image),
            "target": target, "tag": pairs(tags),
        }
        return [AsyncDeployment(self, d) async for d in pages(self._http, path("deployments"), params, limit)]

    async def update(
        self, name: Reference, /, *, image: Reference | None = None, capture: CaptureChoice | None = None,
        replicas: int | None = None, if_generation: int | None = None, **fields: Any,
    ) -> AsyncDeployment:
        """Changes what is given and keeps the rest (JSON Merge Patch): a new generation that rolls in without a
        failed call. ``fields`` are the document's own: ``env``, ``limits``, ``resources``, ``tags`` …
        With ``if_generation``, Conflict (``code="stale"``) when somebody changed it meanwhile.
        """
        patch = {**fields, **absent_dropped(
            image=None if image is None else reference(image), capture=capture_part(capture), replicas=replicas)}
        head = {} if if_generation is None else {"If-Match": f'"{if_generation}"'}
        where = path("deployments", reference(name))
        return AsyncDeployment(self, await self._http.json("PATCH", where, json=patch, headers=head))

    async def scale(self, name: Reference, replicas: int) -> AsyncDeployment:
        """Sets the number of replicas (1 or more). Surplus replicas drain first.

        >>> yard.deployments.scale("iris", 2).wait().replicas_ready
        2
        """
        return await self.update(name, replicas=replicas)

    async def rollback(self, name: Reference, generation: int | None = None) -> AsyncDeployment:
        """Writes a new generation copied from ``generation`` (absent: the last healthy one)."""
        where = path("deployments", reference(name), "rollback")
        body = absent_dropped(generation=generation)
        return AsyncDeployment(self, await self._http.json("POST", where, json=body))

    async def restart(self, name: Reference) -> AsyncDeployment:
        """Replaces every replica by a fresh one, without a failed call: a new generation whose public environment
        says when (``MODELYARD_RESTARTED``), so it rolls as any change does."""
        return await self.update(name, env={"MODELYARD_RESTARTED": datetime.now(UTC).isoformat(timespec="seconds")})

    async def history(self, name: Reference) -> Sequence[dict[str, Any]]:
        """The last ten generations, the newest first: what each asked for and how it went."""
        answer = await self._http.json("GET", path("deployments", reference(name), "history"))
        return list(answer["items"])

    async def log(self, name: Reference, *, tail: int = 100, follow: bool = False) -> AsyncIterator[str]:
        """The replicas' output, line by line, each prefixed with the replica's name."""
        where = path("deployments", reference(name), "log")
        params: Params = {"tail": tail, "follow": follow or None}
        async with self._http.lines(where, params=params, endless=follow) as lines:
            async for line in lines:
                yield line.decode(errors="replace")

    async def delete(self, name: Reference, *, wait_s: float = 60.0) -> None:
        """Drains and stops it; returns when it is gone or ``wait_s`` is over (Unavailable, ``code="timeout"``; 0
        does not wait). One that is not there is fine."""
        where = path("deployments", reference(name))
        await self._http.send("DELETE", where)
        if wait_s > 0:
            try:
                await settle(self._http, where, lambda _: False, wait_s, f"deployment '{reference(name)}'")
            except NotFound:
                return

    async def score(
        self, name: Reference, data: Data, *, protocol: str = "rest", timeout_s: float = 60.0,
    ) -> Answer:
        """Scores rows (``[[5.1, 3.5, 1.4, 0.2]]``), a dict sent as it is, a numpy array or a pandas frame.

        ``rest`` posts JSON to ``/score`` and gives its JSON; ``grpc`` sends tensors and gives
        ``{name: numpy array}``. Calls go straight to the deployment; from another machine, where a loopback
        address means nothing, through the yard.
        """
        scorer = await self._scorer(name)
        return await scorer.score(data, protocol=protocol, timeout_s=timeout_s)

    async def _scorer(self, name: Reference) -> AsyncScorer:
        key = reference(name)
        if key not in self._scorers:
            found = await self.get(key)
            self._scorers[key] = AsyncScorer(key, found.endpoints, self._http)
        return self._scorers[key]

    async def settled(self, name: str, timeout_s: float, on_progress: OnProgress | None) -> dict[str, Any]:
        """The document once the newest generation is healthy. Raises as ``AsyncDeployment.wait`` says."""

        def seen(document: dict[str, Any]) -> None:
            if on_progress:
                on_progress(Progress("deploy", message=describe(document)))

        what = f"deployment '{name}'"
        document = await settle(self._http, path("deployments", name), is_settled, timeout_s, what, seen)
        if document["phase"] != "healthy":
            raise ModelyardError(
                f"{what} is {document['phase']}: {reason_of(document)}", code="deployment-failed",
                document=document, help=f"modelyard deployments log {name}")
        return document

    async def close(self) -> None:
        """Closes the channels to deployments."""
        for scorer in self._scorers.values():
            await scorer.close()
        self._scorers.clear()


def is_settled(document: dict[str, Any]) -> bool:
    """Whether the newest generation is healthy or was given up (a lost replica alone is neither)."""
    if int(document.get("observed_generation") or 0) < int(document["generation"]):
        return False
    if document["phase"] in ("healthy", "failed"):
        return True
    given_up = any(c["type"] == "Progressing" and c["status"] == "False" for c in document.get("conditions") or [])
    return document["phase"] == "degraded" and given_up


def describe(document: Mapping[str, Any]) -> str:
    """``progressing, 1 of 2 replicas ready``."""
    ready, wanted = document.get("replicas_ready") or 0, document.get("replicas") or 1
    return f"{document.get('phase')}, {ready} of {wanted} replicas ready"
