"""Real servers without container images: installed by package managers, started as processes of the caller's own user.

    python -m infra.stack start             # what this machine can run; says what it cannot, and why
    python -m infra.stack status
    python -m infra.stack stop              # exactly what was started

One module per server, each a ``Server`` with four verbs. Downloads are cached outside the tree, by version.
"""

from __future__ import annotations

import importlib

from .server import Server, StackError

__all__ = ["SERVERS", "Server", "StackError", "server_class"]

SERVERS = {
    "kafka": ("kafka", "Kafka"),
    "mongo": ("mongo", "Mongo"),
    "azure": ("azurite", "Azurite"),
    "docker": ("docker", "Docker"),
    "registry": ("registry", "Registry"),
    "kubernetes": ("kubernetes", "Kubernetes"),
}
"""Name → (module, class), in the order they are started."""


def server_class(name: str) -> type[Server]:
    """The class of a server. StackError for a name that is none."""
    if name not in SERVERS:
        raise StackError(f"no server is called {name}; there are: {', '.join(SERVERS)}")
    module, class_ = SERVERS[name]
    found: type[Server] = getattr(importlib.import_module(f"{__name__}.{module}"), class_)
    return found
