"""How an error is told: all of it, and nothing twice."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from modelyard.cli.guard import explain
from modelyard.cli.main import app
from modelyard.core.errors import InUse, Invalid

LOST = "cannot read 'nofile.txt': No such file or directory"


@pytest.mark.parametrize(("message", "errors", "lines"), [
    (LOST, [("requirements", LOST)], []),
    ("a: is wrong", [("a", "is wrong")], []),
    ("properties.p is '1' and cannot change", [("properties.p", "is '1' and cannot change")], []),
    ("line 1: x; line 2: y; z", [("requirements", "line 1: x; line 2: y"), ("requirements", "z")], []),
    ("a: Field required", [("a", "Field required"), ("b", "Field required")], ["b: Field required"]),
    ("data: Field required", [("data", "Field required"), ("a", "Field required")], ["a: Field required"]),
    ("'x' runs on 'local' and stays there", [("target", "cannot be changed")], ["target: cannot be changed"]),
    ("a merge patch is an object", [("", "an object is needed")], ["an object is needed"]),
    ("2 problems", [("a", "is wrong"), ("b", "is missing")], ["a: is wrong", "b: is missing"]),
    ("no list", None, []),
])
def test_no_problem_is_told_twice_and_none_is_lost(
    message: str, errors: list[tuple[str, str]] | None, lines: list[str], capsys: pytest.CaptureFixture[str],
) -> None:
    given: Any = errors and [{"field": field, "message": text} for field, text in errors]
    explain(Invalid(message, errors=given))
    assert capsys.readouterr().err == "\n".join([f"error: {message}", *(f"  {line}" for line in lines)]) + "\n"


def test_what_is_in_the_way_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    explain(InUse("iris:1 is in use", blockers=[{"kind": "image", "id": "x:1", "phase": "ready"}],
                  help="modelyard images delete x:1"))
    assert capsys.readouterr().err == \
        "error: iris:1 is in use\n  image x:1 (ready)\n  try: modelyard images delete x:1\n"


def test_a_file_that_is_not_there_is_one_line() -> None:
    done = CliRunner().invoke(app, ["images", "build", "x", "-r", "/nowhere/nofile.txt"])
    assert (done.exit_code, done.stderr.count("nofile.txt"), len(done.stderr.splitlines())) == (1, 1, 1), done.stderr
