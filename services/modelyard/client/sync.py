"""Client: the blocking side of AsyncClient. Every method is the async one, waited for; see its documentation there."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .capture import AsyncCapture
from .client import AsyncClient
from .dead import AsyncDeadLetters
from .deployments import AsyncDeployment, AsyncDeployments
from .faces import Face, Portal, again, blocks, gives, lists, told_as, yields
from .fields import DeploymentFields, ImageFields, ModelFields, Reference
from .images import AsyncImage, AsyncImages
from .models import AsyncModel, AsyncModels

if TYPE_CHECKING:
    from .inference_sync import ScoringClient


class Model(ModelFields, Face[AsyncModel]):
    """A registered model."""

    @property
    def document(self) -> dict[str, Any]:
        """The whole document, as GET answers it."""
        return self._inner.document

    reload = again(AsyncModel.reload)
    update = again(AsyncModel.update)
    alias = blocks(AsyncModel.alias)
    download = blocks(AsyncModel.download)
    delete = blocks(AsyncModel.delete)


class Models(Face[AsyncModels]):
    """The registry."""

    register = gives(Model, AsyncModels.register)
    create = gives(Model, AsyncModels.create)
    get = gives(Model, AsyncModels.get)
    list = lists(Model, AsyncModels.list)
    update = gives(Model, AsyncModels.update)
    alias = blocks(AsyncModels.alias)
    unalias = blocks(AsyncModels.unalias)
    delete = blocks(AsyncModels.delete)
    download = blocks(AsyncModels.download)


class Image(ImageFields, Face[AsyncImage]):
    """An image."""

    @property
    def document(self) -> dict[str, Any]:
        """The whole document, as GET answers it."""
        return self._inner.document

    reload = again(AsyncImage.reload)
    wait = again(AsyncImage.wait)
    update = again(AsyncImage.update)
    log = blocks(AsyncImage.log)
    delete = blocks(AsyncImage.delete)


class Images(Face[AsyncImages]):
    """The image builder."""

    build = gives(Image, AsyncImages.build)
    create = gives(Image, AsyncImages.create)
    get = gives(Image, AsyncImages.get)
    list = lists(Image, AsyncImages.list)
    update = gives(Image, AsyncImages.update)
    delete = blocks(AsyncImages.delete)
    log = yields(AsyncImages.log)
    export = blocks(AsyncImages.export)
    kept = blocks(AsyncImages.kept)
    verify = blocks(AsyncImages.verify)
    key = blocks(AsyncImages.key)


class Deployment(DeploymentFields, Face[AsyncDeployment]):
    """A deployment."""

    @property
    def document(self) -> dict[str, Any]:
        """The whole document, as GET answers it."""
        return self._inner.document

    reload = again(AsyncDeployment.reload)
    wait = again(AsyncDeployment.wait)
    score = blocks(AsyncDeployment.score)

    @told_as(AsyncDeployment.client)
    def client(self, **options: Any) -> ScoringClient:
        from .inference_sync import ScoringClient

        return ScoringClient(self.grpc_address, **self._inner._terms(options))

    update = again(AsyncDeployment.update)
    scale = again(AsyncDeployment.scale)
    rollback = again(AsyncDeployment.rollback)
    restart = again(AsyncDeployment.restart)
    delete = blocks(AsyncDeployment.delete)


class Deployments(Face[AsyncDeployments]):
    """The deployer."""

    create = gives(Deployment, AsyncDeployments.create)
    put = gives(Deployment, AsyncDeployments.put)
    get = gives(Deployment, AsyncDeployments.get)
    list = lists(Deployment, AsyncDeployments.list)
    update = gives(Deployment, AsyncDeployments.update)
    scale = gives(Deployment, AsyncDeployments.scale)
    rollback = gives(Deployment, AsyncDeployments.rollback)
    restart = gives(Deployment, AsyncDeployments.restart)
    history = blocks(AsyncDeployments.history)
    log = yields(AsyncDeployments.log)
    delete = blocks(AsyncDeployments.delete)
    score = blocks(AsyncDeployments.score)


class Capture(Face[AsyncCapture]):
    """What was captured of one deployment."""

    raw = blocks(AsyncCapture.raw)
    read = blocks(AsyncCapture.read)
    verify = blocks(AsyncCapture.verify)


class DeadLetters(Face[AsyncDeadLetters]):
    """Events that a service could not handle."""

    list = blocks(AsyncDeadLetters.list)
    get = blocks(AsyncDeadLetters.get)
    replay = blocks(AsyncDeadLetters.replay)
    drop = blocks(AsyncDeadLetters.drop)


async def _opened(url: str | None, token: str | None, timeout_s: float) -> AsyncClient:
    return AsyncClient(url, token, timeout_s=timeout_s)


class Client(Face[AsyncClient]):
    """The whole yard behind one URL, for code that waits.

    ``url``: absent, ``MODELYARD_URL``, else http://127.0.0.1:8700. ``token``: absent, ``MODELYARD_TOKEN``.
    Safe to share between threads. Not safe to carry over a fork: make a new one there.

    >>> yard = Client()
    >>> yard.models.list()
    []
    """

    def __init__(self, url: str | None = None, token: str | None = None, *, timeout_s: float = 90.0) -> None:
        portal = Portal()
        try:
            inner = portal.run(_opened(url, token, timeout_s))
        except BaseException:
            portal.close()
            raise
        super().__init__(inner, portal)
        self.models = Models(inner.models, portal)
        self.images = Images(inner.images, portal)
        self.deployments = Deployments(inner.deployments, portal)
        self.dead = DeadLetters(inner.dead, portal)

    @property
    def url(self) -> str:
        """Where this client calls."""
        return self._inner.url

    def capture(self, deployment: Reference) -> Capture:
        """What was captured of a deployment: ``read``, ``raw``, ``verify``."""
        return Capture(self._inner.capture(deployment), self._portal)

    telemetry = blocks(AsyncClient.telemetry)
    events = yields(AsyncClient.events)
    apply = blocks(AsyncClient.apply)
    ready = blocks(AsyncClient.ready)
    ask = blocks(AsyncClient.ask)

    def close(self) -> None:
        """Closes every connection and ends the thread. Closing twice is fine."""
        if self._portal.open:
            self._portal.run(self._inner.close())
            self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self.close()
