"""Models through the SDK, against a real yard."""

from pathlib import Path

import pytest

from modelyard import AsyncClient, Client
from modelyard.client import Progress
from modelyard.core.errors import Conflict, InUse, Invalid, NotFound
from tests.e2e.yard import Yard


def test_a_file_goes_there_and_comes_back(client: Client, tmp_path: Path) -> None:
    source = tmp_path / "big.bin"
    source.write_bytes(bytes(range(256)) * 20_000)
    seen: list[Progress] = []
    model = client.models.register("there-and-back", source, tags={"a": "b"}, on_progress=seen.append)
    assert model.version == 1 and model.tags == {"a": "b"} and model.document["filename"] == "big.bin"
    assert [p.done for p in seen if p.stage == "upload"][-1] == source.stat().st_size
    seen.clear()
    again = client.models.register("there-and-back", source, on_progress=seen.append)
    assert again.version == 2 and not [p for p in seen if p.stage == "upload"], "what is there is not sent again"
    to = tmp_path / "home"
    assert model.download(to).read_bytes() == source.read_bytes()
    with pytest.raises(Conflict, match="is there already"):
        model.download(to)
    assert client.models.download(model, to, exist_ok=True) == to / "big.bin"
    assert sorted(p.name for p in to.iterdir()) == ["big.bin"]


def test_a_folder_stays_a_folder(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights.json").write_text("[1]")
    (folder / "labels.txt").write_text("a\nb\n")
    model = client.models.register("net", folder)
    assert model.document["unpack"] is True
    home = model.download(tmp_path / "home")
    assert home.name == "net-1" and (home / "deep" / "weights.json").read_text() == "[1]"


def test_find_change_and_point(client: Client, weights: Path) -> None:
    one = client.models.register("pointed", weights, tags={"team": "flora"}, properties={"p": "1"})
    two = client.models.register("pointed", weights, parent=one)
    assert [m.id for m in client.models.list(name="pointed")] == ["pointed:2", "pointed:1"]
    assert [m.id for m in client.models.list(name="pointed", limit=1)] == ["pointed:2"]
    assert [m.id for m in client.models.list(tags={"team": "flora"}, name="pointed")] == ["pointed:1"]
    assert client.models.get("pointed").id == two.id and two.document["parent"] == one.id
    assert one.update(tags={"team": None, "x": "y"}).tags == {"x": "y"}
    with pytest.raises((Conflict, Invalid)):
        one.update(properties={"p": "2"})
    client.models.alias(one, "champion")
    assert client.models.get("pointed@champion").id == one.id
    with pytest.raises(InUse) as caught:
        one.delete()
    assert caught.value.detail["blockers"][0]["kind"] == "alias"
    with pytest.raises(Invalid, match="exact version"):
        client.models.alias("pointed", "champion")
    client.models.unalias("pointed", "champion")
    one.delete()
    client.models.delete(one)
    with pytest.raises(NotFound):
        one.reload()


def test_every_problem_of_a_request_is_told(client: Client) -> None:
    with pytest.raises(Invalid) as caught:
        client.models.create({"name": "bad name", "artifact": "sha256:1", "colour": "red"})
    assert {e["field"] for e in caught.value.detail["errors"]} == {"name", "artifact", "colour"}


def test_nothing_to_upload(client: Client, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="there is no file or folder"):
        client.models.register("x", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="no file in"):
        client.models.register("x", tmp_path / "empty")


async def test_the_async_side(live: Yard, weights: Path) -> None:
    async with AsyncClient(live.url()) as yard:
        model = await yard.models.register("asynchronous", weights)
        assert [m.id for m in await yard.models.list(name="asynchronous")] == [model.id]
        topics = [e.topic async for e in yard.events(subject=model.id, after="beginning", follow=False)]
        assert topics == ["model.registered"]
        await model.delete()


def test_events_and_dead_letters(client: Client, weights: Path) -> None:
    before = [e.cursor for e in client.events(after="beginning", follow=False)]
    model = client.models.register("eventful", weights)
    stream = client.events(["model.*"], after=before[-1] if before else "beginning")
    event = next(e for e in stream if e.subject == model.id)
    stream.close()  # type: ignore[attr-defined]
    assert event.data["name"] == "eventful" and event.cursor
    with pytest.raises(Invalid, match="no event has the type"):
        list(client.events(["nonsense"], follow=False))
    assert client.dead.list() == []
    with pytest.raises(NotFound):
        client.dead.get("none")
