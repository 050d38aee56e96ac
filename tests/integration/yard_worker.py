"""Registry and image builder in a process of its own: ``python -m tests.integration.yard_worker DATA [STORE]``. Prints
its URL, and runs until its input ends; or until it is killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.unit.image_builder.conftest import running


async def main(data: Path, store: str) -> None:
    async with running(data, store) as yard:
        print(yard.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""))
