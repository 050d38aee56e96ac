"""Files of dependencies on the command line: `images build -r`, and what `deploy` finds in a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelyard.cli.folder import found
from modelyard.cli.main import app
from tests.e2e.yard import Yard

from .test_commands import fails

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SCORE = "def run(data):\n    return data\n"


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "score.py").write_text(SCORE)
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


@pytest.mark.parametrize(("file", "text", "lines"), [
    ("requirements.txt", "numpy\n-e .\nnot a name\n",
     ["requirements.txt line 2: editable", "requirements.txt line 3: "]),
    ("environment.yml", "dependencies: [scipy, libgomp, python=2]\n",
     ["scipy (line 1), libgomp (line 1)", "environment.yml line 1: python =2"]),
    ("pyproject.toml", "[tool.x]\n", ["no [project] table"]),
    ("pyproject.toml[gpu]", "[project]\n", ["there is no extra 'gpu'"]),
])
def test_what_is_wrong_with_a_file_is_told_before_a_yard_is_asked(
    tmp_path: Path, file: str, text: str, lines: list[str],
) -> None:
    (tmp_path / file.partition("[")[0]).write_text(text)
    done = CliRunner().invoke(app, ["--url", "http://127.0.0.1:1", "images", "build", "x", "-r", str(tmp_path / file)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and all(line in done.stderr for line in lines), done.stderr


@pytest.mark.parametrize(("options", "files", "told"), [
    ([], {"requirements_txt": "numpy\n-e .\n"}, "requirements.txt line 2: editable"),
    ([], {"environment_yml": "dependencies: [libgomp]\n"}, "libgomp (line 1)"),
    (["--image", "Not_a_name"], {}, "Image 'Not_a_name'"), (["--model", "no/name"], {}, "Model 'no/name'"),
    (["--env", "A"], {}, "--env"),
])
def test_deploy_looks_at_all_that_is_here_before_it_makes_anything(
    tmp_path: Path, options: list[str], files: dict[str, str], told: str,
) -> None:
    """At this address nobody would take a model."""
    folder = folder_of(tmp_path / "iris", **files)
    (folder / "weights.bin").write_bytes(b"w")
    done = CliRunner().invoke(
        app, ["--url", "http://127.0.0.1:1", "deploy", str(folder), "--name", "iris", *options])
    assert done.exit_code in (1, 2) and told in done.stderr, done.stderr


def test_the_first_file_of_dependencies_is_read(tmp_path: Path) -> None:
    tools, project, conda = "[tool.ruff]\n", "[project]\nname = 'x'\n", "dependencies: []\n"
    for files, first, unread in (
        ({}, None, ()),
        ({"pyproject_toml": tools}, None, ()),
        ({"pyproject_toml": tools, "environment_yml": conda}, "environment.yml", ()),
        ({"pyproject_toml": project, "environment_yaml": conda}, "pyproject.toml", ("environment.yaml",)),
        ({"requirements_txt": "", "pyproject_toml": project, "environment_yml": conda}, "requirements.txt",
         ("pyproject.toml", "environment.yml")),
    ):
        folder = folder_of(tmp_path / str(len(list(tmp_path.iterdir()))), **files)
        (folder / "weights.json").write_text("[1]")
        with found(folder, False) as parts:
            assert parts.model == folder / "weights.json", "a file of dependencies is no part of the model"
            assert ((parts.requirements.name if parts.requirements else None), parts.unread) == (first, unread)


@pytest.mark.slow
def test_a_folder_with_an_environment(live: Yard, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "conda", pyproject_toml="[tool.x]\n",
                       environment_yml=f"dependencies: [python={PYTHON}, {{pip: [-c .bounds.txt]}}]\n")
    (folder / ".bounds.txt").write_text("numpy>=1\n")
    live.cli("deploy", str(folder), "--name", "conda")
    image = json.loads(live.cli("images", "show", "conda:1", "-o", "json").stdout)
    assert (image["python"], image["requirements"], image["constraints"]) == (PYTHON, [], ["numpy>=1"])
    again = live.cli("deploy", str(folder), "--name", "conda")
    assert "image conda:1 (as it was)" in again.stderr
    (folder / "environment.yml").write_text("dependencies:\n- scipy\n- libgomp\n")
    told = fails(live, "deploy", str(folder), "--name", "conda")
    assert "environment.yml asks for packages of conda" in told and "scipy (line 2), libgomp (line 3)" in told
