"""Folders with a Dockerfile on their way: what is sent, and what stays here."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.client.contexts import Ignores, _stage
from modelyard.core.errors import Invalid


@pytest.mark.parametrize(("rules", "covered", "sent"), [
    ("secret\n", ["secret", "secret/deep/x"], ["secrets", "a/secret"]),
    ("*.pyc\n**/*.log", ["a.pyc", "a.log", "a/b/c.log"], ["a/b.pyc"]),
    ("# note\n\ndata\n!data/keep\n", ["data/x"], ["data/keep", "data/keep/y", "note"]),
    ("*\n!app\n", ["x", "a/b"], ["app", "app/main.py"]),
    ("/top/\n./other\n", ["top/x", "other"], ["a/top"]),
    ("a?[b-d].t\n[!x]y\n", ["ayc.t", "zy"], ["aya.t", "a/c.t", "xy"]),
    ("build/**/tmp\n", ["build/tmp", "build/a/b/tmp/x"], ["build/a"]),
    ("**\n!**/*.py\n", ["x", "a/b"], ["a/b.py", "c.py"]),
])
def test_dockerignore(rules: str, covered: list[str], sent: list[str]) -> None:
    ignores = Ignores(rules)
    assert [name for name in covered if not ignores.covers(name)] == []
    assert [name for name in sent if ignores.covers(name)] == []


def test_what_is_sent(tmp_path: Path) -> None:
    source, place = tmp_path / "own", tmp_path / "place"
    (source / "app").mkdir(parents=True)
    place.mkdir()
    for name in ("Dockerfile", "app/main.py", ".env"):
        (source / name).write_text("x")
    (source / "app/tool").write_text("x")
    (source / "app/tool").chmod(0o755)
    (source / ".dockerignore").write_text(".env\nDockerfile\n")
    _stage(source, place)
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == [
        ".dockerignore", "Dockerfile", "app/main.py", "app/tool"]
    assert (place / "app/tool").stat().st_mode & 0o100
    alone = tmp_path / "alone"
    alone.mkdir()
    _stage(source / "app/main.py", alone)
    assert [p.name for p in alone.iterdir()] == ["Dockerfile"]


def test_what_cannot_be_sent(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no Dockerfile"):
        _stage(tmp_path, tmp_path / "place")
    (tmp_path / "Dockerfile").write_text("FROM x")
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(Invalid, match="is a link"):
        _stage(tmp_path, tmp_path / "place")
    (tmp_path / ".dockerignore").write_text("link")
    (tmp_path / "out").mkdir()
    _stage(tmp_path, tmp_path.parent / "elsewhere")
