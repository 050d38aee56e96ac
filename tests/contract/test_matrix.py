"""The support matrix itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import backends


def test_whatever_is_required_is_in_the_matrix() -> None:
    assert not backends.unknown(), "MODELYARD_REQUIRE names backends that no test here can run"


def test_a_required_backend_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = backends.Backend("kafka", lambda folder: None)
    monkeypatch.setenv("MODELYARD_REQUIRE", "sqlite, kafka")
    with pytest.raises(pytest.fail.Exception, match="kafka"):
        backends.url_of(absent, tmp_path)
    monkeypatch.setenv("MODELYARD_REQUIRE", "sqlite")
    with pytest.raises(pytest.skip.Exception):
        backends.url_of(absent, tmp_path)
