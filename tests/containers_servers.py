"""The servers that tests run in containers: which image, what makes it behave as a native one, and when it serves.

Every port is published on 127.0.0.1. A server that names itself to its clients listens on the same port inside and
outside, so that what it says is right on both sides.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.stack import kafka, mongo
from infra.stack.azurite import Azurite
from infra.stack.registry import Registry
from infra.stack.server import Server, free_port

IMAGES = {"kafka": "apache/kafka:4.1.1", "mongo": "mongo:6.0", "azure": f"modelyard-azurite:{Azurite.version}",
          "registry": "registry:2"}
START_S = 90.0


class NotServing(Exception):
    """A container that ended, or never answered; with the end of what it said."""


def start(name: str, labels: dict[str, str]) -> str:
    """The URL of a new one, which serves. Its container is removed again when it does not."""
    from testcontainers.core.container import DockerContainer

    port = free_port()
    container = DockerContainer(IMAGES[name]).with_kwargs(labels=labels)
    return _SERVERS[name](container, port)


def _published(container: Any, inside: int, port: int) -> None:
    container.ports[f"{inside}/tcp"] = ("127.0.0.1", port)  # its own methods publish on every address


def _serving(container: Any, answers: Callable[[], bool]) -> None:
    try:
        container.start()
        end = time.monotonic() + START_S
        while not answers():
            container.get_wrapped_container().reload()
            if container.get_wrapped_container().status != "running" or time.monotonic() > end:
                raise NotServing(f"{container.image} does not serve: "
                                 f"{container.get_wrapped_container().logs(tail=5).decode(errors='replace')}")
            time.sleep(0.1)
    except BaseException:
        container.stop()
        raise


def _kafka(container: Any, port: int) -> str:
    """With the settings of the native one, as environment."""
    control = free_port()
    about = kafka.PROPERTIES.format(port=port, advertised=port, control=control, data="/var/lib/kafka/data")
    settings = dict(line.split("=", 1) for line in about.splitlines() if line and not line.startswith("#"))
    settings |= {"listeners": f"PLAINTEXT://:{port},CONTROLLER://:{control}", "log.dirs": "/var/lib/kafka/data",
                 "controller.quorum.voters": f"1@localhost:{control}"}
    del settings["controller.quorum.bootstrap.servers"]  # the image formats its storage for voters that are named
    for key, value in settings.items():
        container.with_env(f"KAFKA_{key.upper().replace('.', '_')}", value)
    container.with_env("KAFKA_HEAP_OPTS", " ".join(kafka.JVM[:2]))
    container.with_env("KAFKA_JVM_PERFORMANCE_OPTS", " ".join(kafka.JVM[2:]))
    _published(container, port, port)
    _serving(container, lambda: kafka.serves(port))
    return f"kafka://127.0.0.1:{port}"


def _mongo(container: Any, port: int) -> str:
    container.with_command(["--replSet", mongo.SET, "--port", str(port), "--oplogSize", "256",
                            "--wiredTigerCacheSizeGB", "0.25"])
    _published(container, port, port)
    _serving(container, lambda: _primary(port))
    return f"mongodb://127.0.0.1:{port}/?replicaSet={mongo.SET}"


def _primary(port: int) -> bool:
    """Whether it takes writes; initiates its set when it has none."""
    from pymongo import MongoClient
    from pymongo.errors import PyMongoError

    with contextlib.suppress(PyMongoError), MongoClient[Any](
            "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=1000) as client:
        said = client.admin.command("hello")
        if said.get("isreplicaset"):
            client.admin.command("replSetInitiate", {
                "_id": mongo.SET, "members": [{"_id": 0, "host": f"127.0.0.1:{port}"}],
                "settings": {"electionTimeoutMillis": 1000}})
        return bool(said.get("isWritablePrimary"))
    return False


def _azure(container: Any, port: int) -> str:
    container.with_command(["--blobHost", "0.0.0.0", "--blobPort", "10000", "--location", "/data", "--silent",
                            "--skipApiVersionCheck", "--disableTelemetry"])
    return _like(Azurite, container, 10000, port)


def _registry(container: Any, port: int) -> str:
    container.with_env("REGISTRY_STORAGE_DELETE_ENABLED", "true").with_env("REGISTRY_HTTP_SECRET", f"modelyard-{port}")
    return _like(Registry, container, 5000, port)


def _like(class_: type[Server], container: Any, inside: int, port: int) -> str:
    """One that answers and is named as the native one on that port; the folder is never made."""
    native = class_(Path("/nowhere"), port)
    _published(container, inside, port)
    _serving(container, native.answers)
    return native.url


_SERVERS: dict[str, Callable[[Any, int], str]] = {"kafka": _kafka, "mongo": _mongo, "azure": _azure,
                                                  "registry": _registry}
