"""Declarative documents against a real yard: what differs is written, what is equal is left alone."""

from pathlib import Path
from typing import Any

import pytest

from modelyard import Client
from modelyard.core.errors import Invalid, NotFound

pytestmark = pytest.mark.slow  # real programs are started and stopped

SCORE = "def run(data):\n    return data\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "weights.json").write_text("[1, 2]")
    (tmp_path / "score.py").write_text(SCORE)
    (tmp_path / "lock.txt").write_text("")
    return tmp_path


def documents(name: str, **model: Any) -> list[dict[str, Any]]:
    return [
        {"kind": "Model", "name": name, "path": "weights.json", "tags": {"a": "1"}, "properties": {"p": "1"}, **model},
        {"kind": "Image", "name": f"{name}-image", "models": [name], "score": "score.py", "lock": "lock.txt"},
    ]


def actions(changes: list[Any]) -> list[tuple[str, str]]:
    return [(c.id, c.action) for c in changes]


def test_equal_documents_change_nothing(client: Client, root: Path) -> None:
    first = client.apply(documents("calm"), root=root)
    assert actions(first) == [("calm:1", "created"), ("calm-image:1", "created")]
    assert first[1].document["models"] == ["calm:1"], "a reference means what the document above has become"
    client.images.get("calm-image:1").wait(60)
    events = [e.cursor for e in client.events(after="beginning", follow=False)]
    assert actions(client.apply(documents("calm"), root=root)) == [
        ("calm:1", "unchanged"), ("calm-image:1", "unchanged")]
    assert [e.cursor for e in client.events(after="beginning", follow=False)] == events


def test_what_may_change_is_changed_in_place(client: Client, root: Path) -> None:
    client.apply(documents("mild"), root=root)
    changes = client.apply(
        documents("mild", tags={"b": "2"}, properties={"p": "1", "q": "2"}, description="better"), root=root)
    assert actions(changes)[0] == ("mild:1", "updated")
    model = client.models.get("mild")
    assert (model.version, model.tags, model.properties) == (1, {"b": "2"}, {"p": "1", "q": "2"})
    assert "-  a: '1'" in changes[0].diff and "+  b: '2'" in changes[0].diff


def test_anything_else_is_a_new_version(client: Client, root: Path) -> None:
    client.apply(documents("wild"), root=root)
    (root / "weights.json").write_text("[3]")
    changes = client.apply(documents("wild"), root=root)
    assert actions(changes) == [("wild:2", "created"), ("wild-image:2", "created")]
    assert client.images.get("wild-image:2").wait(60).document["models"] == ["wild:2"]


def test_a_dry_run_only_tells(client: Client, root: Path) -> None:
    changes = client.apply(documents("dry"), root=root, dry_run=True)
    assert actions(changes) == [("dry:?", "created"), ("dry-image:?", "created")]
    assert changes[0].diff.startswith("--- in the yard\n+++ in the file\n")
    with pytest.raises(NotFound):
        client.models.get("dry")


@pytest.mark.parametrize(("broken", "told"), [
    ({"kind": "Modell", "name": "x"}, "needs kind"),
    ({"kind": "Model"}, "needs a name"),
    ({"kind": "Model", "name": "x", "path": "nowhere"}, "there is no file or folder"),
    ({"kind": "Model", "name": "x", "path": "weights.json", "colour": "red"}, "colour"),
    ({"kind": "Model", "name": "x", "path": "weights.json", "tags": {"a": 1}}, r"tags\.a"),
    ({"kind": "Image", "name": "X", "models": []}, "an image name is"),
    ({"kind": "Deployment", "name": "abc", "image": "x", "replicas": 0}, "replicas"),
])
def test_nothing_is_written_when_a_document_is_wrong(
    client: Client, root: Path, broken: dict[str, Any], told: str,
) -> None:
    before = [m.id for m in client.models.list()]
    with pytest.raises(Invalid, match=told):
        client.apply([*documents("halfway"), broken], root=root)
    assert [m.id for m in client.models.list()] == before
