"""Numbers in the environment: one that is none ends the start with a line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.core.errors import Invalid
from modelyard.scoring.settings import Settings
from tests.unit.scoring.roots import launch, make_root

BAD = [
    ("MODELYARD_STUCK_S", "abc", "a number of seconds"), ("MODELYARD_STUCK_S", "-1", "a number of seconds"),
    ("MODELYARD_STUCK_S", "nan", "a number of seconds"), ("MODELYARD_SPOOL_BYTES", "1GiB", "a whole number above 0"),
    ("MODELYARD_SPOOL_BYTES", "0", "a whole number above 0"), ("MODELYARD_THREADS", "abc", "a whole number above 0"),
    ("MODELYARD_THREADS", "1.5", "a whole number above 0"), ("MODELYARD_THREADS", "²", "a whole number above 0"),
]


@pytest.mark.parametrize(("name", "given", "wanted"), BAD)
def test_what_is_no_number_is_told_by_name(name: str, given: str, wanted: str) -> None:
    with pytest.raises(Invalid, match=rf"^{name} is '{given}'; it must be {wanted}$"):
        Settings.read([], {name: given})


def test_numbers_and_nothing_are_fine() -> None:
    Settings.read([], {"MODELYARD_STUCK_S": "0.5", "MODELYARD_SPOOL_BYTES": "1048576", "MODELYARD_THREADS": "2"})
    Settings.read([], {"MODELYARD_STUCK_S": "", "MODELYARD_SPOOL_BYTES": "", "MODELYARD_THREADS": ""})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given", "wanted"), [BAD[0], BAD[3], BAD[5]])
def test_a_start_ends_with_one_line(tmp_path: Path, name: str, given: str, wanted: str) -> None:
    root = make_root(tmp_path, "def run(data):\n    return data\n")
    with launch(root, wait=False, env={name: given}, spool=tmp_path / "spool") as replica:
        assert replica.process.wait(30) == 2
        assert replica.log.read_text() == f"modelyard: cannot start: {name} is '{given}'; it must be {wanted}\n"
