"""The README names every setting, and nothing in it waits to be filled in."""

import re
from pathlib import Path

import pytest

from modelyard.settings import Settings

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{name}` |" in README


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"^[A-Z]+(?:_[A-Z]+)+$", README, re.MULTILINE) == []
