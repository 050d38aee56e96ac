"""Real scoring servers for the scoring client, which say what they ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.unit.scoring.roots import Replica, launch, make_root

CODE = """
import os, time
import numpy as np

ran = os.open(os.environ["RAN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def run(data: dict[str, np.ndarray]):
    if "n" in data:
        os.write(ran, b"%d\\n" % int(data["n"][0]))
    if "fail" in data:
        raise ValueError(f"cannot score {data['fail'][0]}")
    if "sleep" in data:
        time.sleep(float(data["sleep"][0]))
    return {**data, "pid": np.array([os.getpid()])}
"""


@contextlib.contextmanager
def serving(folder: Path, transport: str, *arguments: str, address: str = "", max_queue: int = 512,
            wait: bool = True) -> Iterator[Replica]:
    """A server that gives back its inputs and its process id. ``folder``'s ``ran`` gets a line for each ``n``."""
    root = folder / "root" / "opt" / "modelyard"
    if not root.exists():
        make_root(folder / "root", CODE)
    given = ("--transport", transport, *(("--grpc", address) if address else ()), *arguments)
    with launch(root, wait=wait, env={"RAN": str(folder / "ran")}, arguments=given, deployment="echo",
                limits={"max_queue": max_queue}) as replica:
        replica.grpc = address or replica.grpc
        yield replica


def ran(folder: Path) -> list[int]:
    """The ``n`` of every call that was run."""
    path = folder / "ran"
    return [int(line) for line in path.read_text().split()] if path.exists() else []
