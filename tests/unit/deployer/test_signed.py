"""A target that trusts certain keys runs nothing else: refused where it can be seen at once, else by the loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters import urls
from modelyard.adapters.images_layout import LayoutImages
from modelyard.core.attest import PROVENANCE, STATEMENT
from modelyard.core.errors import Invalid
from modelyard.core.events import Fact
from modelyard.core.layout import image_key
from modelyard.image_builder.keys import Signer, signer
from modelyard.image_builder.model import Image
from tests.handmade import chunks

from .conftest import Desk, desk_on

SPEC = {"name": "iris", "target": "local"}


@asynccontextmanager
async def wary(folder: Path) -> AsyncIterator[tuple[Desk, Signer]]:
    """A desk whose local target asks for the key of its own yard."""
    await asyncio.to_thread((folder / "data").mkdir)
    own = await signer(folder / "data")
    await asyncio.to_thread((folder / "yard.pub").write_text, own.public.pem)
    async with desk_on(folder / "data", targets={"local": f"process://?require_signed={folder}/yard.pub"}) as desk:
        yield desk, own


async def say(desk: Desk, image: Image, key: Signer, digest: str | None = None) -> None:
    """Keeps provenance of the image, or of another ``digest``, signed by ``key``."""
    of = str(digest or image.digest)
    said = {"_type": STATEMENT, "predicateType": PROVENANCE, "subject": [{"digest": {"sha256": of[7:]}}]}
    text = json.dumps(key.sign(json.dumps(said).encode())).encode()
    await desk.context("image-builder").blobs.put(image_key("default", image.id, "provenance"), chunks(text))


def condition(doc: dict[str, Any]) -> tuple[str, str]:
    found = next(c for c in doc["conditions"] if c["type"] == "Progressing")
    return found["reason"], found["message"]


@pytest.mark.slow
async def test_what_the_yard_signed_runs_and_nothing_else(tmp_path: Path) -> None:
    async with wary(tmp_path) as (desk, own):
        stranger = await signer(await asyncio.to_thread(_folder, tmp_path / "stranger"))
        good, nobodys, foreign, turned = [await desk.image(n) for n in (1, 2, 3, 4)]
        await say(desk, good, own)
        await say(desk, foreign, stranger)
        await say(desk, turned, own, digest=good.digest)
        for bad, why in ((nobodys, "no provenance"), (foreign, "not signed by"), (turned, "not about")):
            refused = await desk.call("POST", "/v1/deployments", {**SPEC, "image": bad.id})
            assert (refused.status, refused.body["code"]) == (422, "unsigned"), refused
            assert why in refused.body["detail"] and refused.body["errors"][0]["field"] == "image"
        assert (await desk.call("GET", "/v1/deployments/iris")).status == 404
        made = await desk.call("POST", "/v1/deployments", {**SPEC, "image": good.id})
        assert made.status == 202
        await desk.healthy(1)
        for method, body in (("PATCH", {"image": nobodys.id}), ("PUT", {**SPEC, "image": foreign.id})):
            refused = await desk.call(method, "/v1/deployments/iris", body)
            assert (refused.status, refused.body["code"]) == (422, "unsigned"), refused
        assert (await desk.get())["image"] == good.id
        await desk.call("DELETE", "/v1/deployments/iris")
        await desk.gone()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.slow
async def test_an_image_that_is_built_later_is_looked_at_then(tmp_path: Path, signed: bool) -> None:
    async with wary(tmp_path) as (desk, own):
        image = await desk.image(1, phase="building")
        assert (await desk.call("POST", "/v1/deployments", {**SPEC, "image": image.id})).status == 202
        await desk.until(lambda d: d["phase"] == "pending")
        ctx = desk.context("image-builder")
        found = await ctx.images.get_manifest("scorer", "1")
        from modelyard.image_builder.config import digest_of

        image = image.evolve(phase="ready", digest=digest_of(found[0]))
        if signed:
            await say(desk, image, own)
        await ctx.change(Image, image.id, lambda d: (
            d.evolve(phase="ready", digest=image.digest), (Fact("image.built"),)))
        if signed:
            await desk.healthy(1)
        else:
            failed = await desk.until(lambda d: d["phase"] == "failed")
            reason, message = condition(failed)
            assert reason == "Unsigned" and "scorer:1 is unsigned: it has no provenance" in message
            assert failed["replicas_ready"] == 0 and not failed["serving"]
        await desk.call("DELETE", "/v1/deployments/iris")
        await desk.gone()


@pytest.mark.slow
async def test_going_back_to_an_unsigned_generation_is_refused(tmp_path: Path) -> None:
    async with wary(tmp_path) as (desk, own):
        local = desk.context("deployer").targets["local"]
        keys, local.signed_by = local.signed_by, ()
        old, new = await desk.image(1), await desk.image(2)
        await say(desk, new, own)
        await desk.call("POST", "/v1/deployments", {**SPEC, "image": old.id})
        await desk.healthy(1)
        local.signed_by = keys
        await desk.call("PATCH", "/v1/deployments/iris", {"image": new.id})
        await desk.healthy(2)
        refused = await desk.call("POST", "/v1/deployments/iris/rollback")
        assert (refused.status, refused.body["code"]) == (422, "unsigned"), refused
        await desk.call("DELETE", "/v1/deployments/iris")
        await desk.gone()


@pytest.mark.parametrize("text", [None, "", "no key"])
async def test_a_file_without_keys_is_refused_and_never_means_anything_goes(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        await asyncio.to_thread((tmp_path / "keys").write_text, text)
    with pytest.raises(Invalid, match=r"targets\.local"):
        await urls.open_target("local", f"process://?require_signed={tmp_path}/keys",
                               images=LayoutImages(tmp_path / "images"), data=tmp_path)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
