"""Files of dependencies: what is taken from each kind, and everything that is wrong with one at once."""

from pathlib import Path
from textwrap import dedent

import pytest

from modelyard.client.requirements import Needs, read_requirements
from modelyard.core.errors import Invalid


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text).lstrip("\n"))
    return path


def problems(path: Path | str) -> list[str]:
    """What is told of a file, each beginning with where in it."""
    with pytest.raises(Invalid) as caught:
        read_requirements(path)
    told = [str(e["message"]) for e in caught.value.detail["errors"]]
    assert all(problem in caught.value.message for problem in told)
    folder = str(Path(str(path).partition("[")[0]).parent)
    return [problem.replace(f"{folder}/", "") for problem in told]


def test_a_list_stays_as_it_is() -> None:
    assert read_requirements(None) == Needs()
    assert read_requirements(["numpy", "anything"]) == Needs(["numpy", "anything"])


def test_a_requirements_file_with_what_it_includes(tmp_path: Path) -> None:
    put(tmp_path, "common/more.txt", "pandas[parquet]>=2  # as asked\n-c bounds.txt\nnumpy\n")
    put(tmp_path, "common/bounds.txt", "six<2\n")
    put(tmp_path, "also.txt", "six!=1.0\n")
    path = put(tmp_path, "requirements.txt", """
        # what we need
        numpy
        scikit-learn==1.9.1 ; \\
            python_version >= "3.11"
        -r common/more.txt
        --constraint=also.txt
        w @ https://host.example/w-1-py3-none-any.whl#sha256=00
        """)
    assert read_requirements(path) == Needs(
        ["numpy", 'scikit-learn==1.9.1 ;      python_version >= "3.11"', "pandas[parquet]>=2",
         "w @ https://host.example/w-1-py3-none-any.whl#sha256=00"], ["six<2", "six!=1.0"])
    path.write_text("\ufeffnumpy\n", encoding="utf-8")
    assert read_requirements(str(path)).requirements == ["numpy"]
    path.write_text("")
    assert read_requirements(path) == Needs([])


def test_everything_that_an_image_cannot_have_is_told_with_its_line(tmp_path: Path) -> None:
    put(tmp_path, "loop.txt", "-r requirements.txt\nnot a name\n")
    put(tmp_path, "bounds.txt", "x[extra]<2\n./y\n")
    path = put(tmp_path, "requirements.txt", """
        numpy
        -e .
        ./wheels/x-1-py3-none-any.whl
        y @ file:///y.whl
        z @ https://user:secret@host.example/z.whl
        https://user:secret@host.example/z.whl
        git+https://host.example/z
        --index-url https://host.example/simple
        n==1 --hash=sha256:00
        n==1 --config-settings=a=b
        -r nowhere.txt
        -r https://host.example/r.txt
        -rloop.txt
        -c bounds.txt
        """)
    told = problems(path)
    assert [problem.partition(":")[0] for problem in told] == [
        *(f"requirements.txt line {n}" for n in range(2, 13)), "loop.txt line 1", "loop.txt line 2",
        "bounds.txt line 1", "bounds.txt line 2"]
    words = ["editable", "paths on this machine", "paths on this machine", "credentials", "NAME @", "NAME @",
             "option --index-url", "--lock", "options behind", "there is no file", "not URLs", "includes itself",
             "'not a name' is not a requirement", "without extras", "paths on this machine"]
    for problem, word in zip(told, words, strict=True):
        assert word in problem
    assert "secret" not in str(told)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "none.txt")[0]
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in problems(tmp_path / "bytes.txt")[0]
    (tmp_path / "big.txt").write_bytes(b"#" * 1_000_001)
    assert "more than 1000000 bytes" in problems(tmp_path / "big.txt")[0]


def test_a_project_and_its_extras(tmp_path: Path) -> None:
    path = put(tmp_path, "pyproject.toml", """
        [project]
        name = "Iris_Scorer"
        dependencies = ["numpy>=2", "six"]
        [project.optional-dependencies]
        gpu = ["torch", "iris-scorer[plots]"]
        plots = ["matplotlib", "iris-scorer[gpu]"]
        """)
    assert read_requirements(path) == Needs(["numpy>=2", "six"])
    assert read_requirements(f"{path}[gpu]").requirements == ["numpy>=2", "six", "torch", "matplotlib"]
    assert read_requirements(f"{path}[Plots, gpu]").requirements == ["numpy>=2", "six", "matplotlib", "torch"]
    assert problems(f"{path}[cpu]") == ["pyproject.toml: there is no extra 'cpu'; it has: gpu, plots"]


def test_what_is_wrong_with_a_project(tmp_path: Path) -> None:
    path = put(tmp_path, "pyproject.toml", """
        [project]
        dependencies = ["numpy", "a b", 7, "x @ file:///x.whl"]
        optional-dependencies.gpu = "torch"
        """)
    told = problems(f"{path}[gpu]")
    assert [problem.partition(":")[0] for problem in told] == [
        *(f"pyproject.toml project.dependencies entry {n}" for n in (2, 3, 4)),
        "pyproject.toml project.optional-dependencies.gpu"]
    for text, word in (("[tool.ruff]", "no [project] table"), ("[project", "not TOML"),
                       ('[project]\ndynamic = ["dependencies"]', "are dynamic"),
                       ('[project]\ndependencies = "numpy"', "is not a list")):
        path.write_text(text)
        (one,) = problems(path)
        assert word in one


def test_the_pip_part_of_an_environment(tmp_path: Path) -> None:
    put(tmp_path, "more.txt", "pandas\n-c bounds.txt\n")
    put(tmp_path, "bounds.txt", "numpy<3\n")
    path = put(tmp_path, "environment.yml", """
        name: iris
        channels: [conda-forge]
        dependencies:
          - conda-forge::python=3.11
          - pip
          - pip:
            - scikit-learn==1.9.1  # as trained
            - -r more.txt
        """)
    assert read_requirements(path) == Needs(["scikit-learn==1.9.1", "pandas"], ["numpy<3"], "3.11")


@pytest.mark.parametrize(("said", "python"), [
    ("python", None), ("python=3.12", "3.12"), ("python==3.12.4", "3.12"), ("python 3.12", "3.12"),
    ("python=3.12.*", "3.12"), ("python=3.12.4=h1_cpython", "3.12"), ("Python = 3.12", "3.12")])
def test_the_python_of_an_environment(tmp_path: Path, said: str, python: str | None) -> None:
    path = put(tmp_path, "environment.yaml", f"dependencies: ['{said}']")
    assert read_requirements(path) == Needs([], None, python)


def test_packages_of_conda_are_named_and_not_guessed(tmp_path: Path) -> None:
    path = put(tmp_path, "environment.yml", """
        dependencies:
          - python>=3.11
          - numpy=1.26
          - conda-forge::libgomp
          - pip:
            - not a name
            - {a: b}
            - -e .
          - [nested]
        """)
    told = problems(path)
    assert [problem[:22] for problem in told[:-1]] == [f"environment.yml line {n}" for n in (2, 6, 7, 8, 9)]
    assert "python=3.11" in told[0] and "editable" in told[3]
    assert "numpy (line 3), libgomp (line 4)" in told[-1] and "pip: part" in told[-1] and "base image" in told[-1]


@pytest.mark.parametrize(("text", "word"), [
    ("a: [", "not YAML"), ("name: x", "no list of dependencies"), ("dependencies: x", "no list of dependencies"),
    ("- a", "no list of dependencies"), ("", "no list of dependencies"),
    ("dependencies: [{npm: [x]}]", "only pip:"), ("dependencies: [{pip: x}]", "only pip:"),
    ("dependencies: ['python=2.7']", "not one version"), ("dependencies: ['python=3.11|3.12']", "not one version")])
def test_what_is_no_environment(tmp_path: Path, text: str, word: str) -> None:
    (one,) = problems(put(tmp_path, "environment.yml", text))
    assert word in one
