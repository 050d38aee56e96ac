"""An image without a base is refused where replicas are containers, before anything is written."""

from __future__ import annotations

import pytest

from modelyard.adapters import urls

from .conftest import Desk


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_an_image_without_a_base_is_refused_by_a_container_target(desk: Desk, method: str) -> None:
    ctx = desk.context("deployer")
    ctx.targets["boxes"] = await urls.open_target(  # type: ignore[index]
        "boxes", "docker:///nowhere/docker.sock", images=ctx.images, data=ctx.data)
    await desk.image(1, base="docker.io/library/python:3.11")
    await desk.image(2)
    spec = {"name": "iris", "image": "scorer:2", "target": "boxes"}
    if method == "PATCH":
        made = await desk.call("POST", "/v1/deployments", {**spec, "image": "scorer:1"})
        assert made.status == 202, made
        spec = {"image": "scorer:2"}
    refused = await desk.call(method, "/v1/deployments" + ("/iris" if method != "POST" else ""), spec)
    assert refused.status == 422 and refused.body["code"] == "needs-base", refused
    assert refused.body["errors"][0]["field"] == "image" and "scorer:2 has no base" in refused.body["detail"]
    there = await desk.call("GET", "/v1/deployments/iris")
    assert there.body["image"] == "scorer:1" if method == "PATCH" else there.status == 404
