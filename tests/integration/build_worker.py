"""Builds one image in a process of its own: ``python -m tests.integration.build_worker WORK [STORE]``, and prints its
digest. WORK is a folder below the one that it is started in; wheels, umask, time zone and so on come from there."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.unit.image_builder.conftest import running

SCORE = "def run(data):\n    return data\n"
FILES = {"b.txt": "second", "a.txt": "first", "Ä.txt": "third", "sub/c.txt": "fourth"}


def scoring(folder: Path) -> Path:
    for name, text in {"score.py": SCORE, **FILES}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


async def main(work: Path, store: str) -> None:
    async with running(work / "data", store) as yard:
        await yard.register("iris", b"weights" * 1000, properties={"b": "1", "a": "2"}, tags={"by": str(os.getpid())})
        asked = await yard.post(
            name="iris", models=["iris"], score=await yard.upload_folder(scoring(work / "score")),
            env={"B": "1", "A": "2"}, requirements=["tiny", "nested>=1"])
        doc = await yard.over(asked["id"])
        assert doc["phase"] == "ready", (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
        if store:
            await yard.attached(doc["id"])
        print(doc["digest"])


if __name__ == "__main__":
    asyncio.run(main(Path.cwd() / sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""))
