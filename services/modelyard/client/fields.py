"""What can be read off a model, an image or a deployment without asking the server again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from ..core.errors import Unavailable


class HasId(Protocol):
    """A thing with an id: a model, an image, a deployment."""

    @property
    def id(self) -> str:
        """``iris:4``."""


Reference = str | HasId
"""``"iris:4"``, ``"iris"`` (the highest version), ``"iris@champion"``, or the object itself."""


def reference(of: Reference) -> str:
    """The text of a reference."""
    return of if isinstance(of, str) else of.id


class Fields(ABC):
    """Read access to a document as the server answered it last (``document`` holds all of it)."""

    @property
    @abstractmethod
    def document(self) -> dict[str, Any]:
        """The whole document, as GET answers it."""

    @property
    def id(self) -> str:
        """``iris:4`` for models and images, the name for deployments."""
        return str(self.document["id"])

    @property
    def name(self) -> str:
        """The name without the version."""
        return str(self.document["name"])

    @property
    def generation(self) -> int:
        """Raised by every accepted change of a caller; the ETag."""
        return int(self.document["generation"])

    @property
    def tags(self) -> Mapping[str, str]:
        """Text to text, mutable on the server through ``update``."""
        return dict(self.document.get("tags") or {})

    def __repr__(self) -> str:
        phase = self.document.get("phase")
        return f"<{type(self).__name__.removeprefix('Async')} {self.id}{' ' + str(phase) if phase else ''}>"


class Versioned(Fields):
    """What models and images share."""

    @property
    def version(self) -> int:
        """1, 2, 3 …, given by the server, never reused."""
        return int(self.document["version"])

    @property
    def properties(self) -> Mapping[str, str]:
        """Text to text; keys can be added, never changed."""
        return dict(self.document.get("properties") or {})


class ModelFields(Versioned):
    """A registered model."""

    @property
    def artifact(self) -> str:
        """The digest of its bytes: ``sha256:…``."""
        return str(self.document["artifact"])

    @property
    def signature(self) -> Mapping[str, Any] | None:
        """What it takes and gives, where its file or its registration says."""
        return self.document.get("signature")

    @property
    def sample(self) -> Any:
        """An input that it takes, as a body of ``/score``, where there is one."""
        return self.document.get("sample")


class ImageFields(Versioned):
    """An image."""

    @property
    def phase(self) -> str:
        """``queued``, ``building``, ``ready``, ``failed`` or ``cancelled``."""
        return str(self.document.get("phase") or "")

    @property
    def digest(self) -> str | None:
        """The OCI digest, once it is ready."""
        return self.document.get("digest")

    @property
    def signatures(self) -> Mapping[str, Any]:
        """Model id → ``{"inputs": [{"name", "datatype", "shape"}], "outputs": […]}``, once it is ready, where the
        models' own flavours serve and their files or registrations say."""
        return dict(self.document.get("signatures") or {})

    @property
    def samples(self) -> Mapping[str, Any]:
        """Model id → an input that it takes, as a body of ``/score``."""
        return dict(self.document.get("samples") or {})

    @property
    def served_as(self) -> Mapping[str, str]:
        """Model id → ``onnx``, where the image holds a graph that was made of the model."""
        return dict(self.document.get("served_as") or {})


class DeploymentFields(Fields):
    """A deployment."""

    @property
    def phase(self) -> str:
        """``pending``, ``progressing``, ``healthy``, ``degraded``, ``failed`` or ``deleting``."""
        return str(self.document.get("phase") or "")

    @property
    def image(self) -> str | None:
        """The image of its newest generation: ``iris-scorer:7``."""
        return self.document.get("image")

    @property
    def models(self) -> list[str]:
        """The models of its image: ``["iris:4"]``."""
        return list(self.document.get("models") or [])

    @property
    def replicas_ready(self) -> int:
        """How many replicas passed a real probe."""
        return int(self.document.get("replicas_ready") or 0)

    @property
    def endpoints(self) -> Mapping[str, str]:
        """``{"grpc": "127.0.0.1:8081", "rest": "http://127.0.0.1:8080"}``; empty until ports are chosen."""
        return dict(self.document.get("endpoints") or {})

    @property
    def grpc_address(self) -> str:
        """Where gRPC clients call. Raises Unavailable until there is such a place."""
        if not (address := self.endpoints.get("grpc")):
            raise Unavailable(f"deployment '{self.id}' has no address yet; wait until it is healthy")
        return address
