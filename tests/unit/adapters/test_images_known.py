"""What a registry client learns of the blobs that are there already."""

from __future__ import annotations

from typing import Any

from modelyard.adapters.images_registry_known import Known

LAYER, BILL = "sha256:" + "1" * 64, "sha256:" + "2" * 64
ABOUT = "sha256-" + "3" * 64


async def test_documents_about_images_do_not_hide_the_images() -> None:
    """Their tags sort behind those of the versions, and only the last few are looked at."""
    asked: list[str] = []

    async def registry(repo: str, path: str) -> dict[str, Any]:
        asked.append(path)
        if "_catalog" in path:
            return {"repositories": ["yard/iris"]}
        if path.endswith("/tags/list"):
            return {"tags": ["1", "2", ABOUT, f"{ABOUT}.1.provenance", f"{ABOUT}.1.sbom", f"{ABOUT}.2.sbom"]}
        return {"layers": [{"digest": BILL if "sha256-" in path else LAYER, "size": 1}]}

    known = Known("yard/", registry)
    assert await known.where(LAYER) == "yard/iris" and await known.where(BILL) is None
    assert [path.rpartition("/")[2] for path in asked if "/manifests/" in path] == ["1", "2"]
    await known.close()
