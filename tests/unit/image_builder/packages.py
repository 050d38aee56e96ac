"""Packages that a test makes: a folder of them stands in for an index, and no network is needed."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from modelyard.image_builder import sandbox
from tests.backends import required

SERVER = {"aiohttp": "3.12.0", "grpcio": "1.80.0", "grpcio-health-checking": "1.80.0", "grpcio-reflection": "1.80.0",
          "h2corn": "2.0.0", "numpy": "2.0.0", "orjson": "3.10.0", "prometheus-client": "0.21.0", "protobuf": "7.0.0",
          "uvloop": "0.21.0", "zlib-ng": "1.0.0"}
"""What every image's scoring server asks for."""
BACKEND = """
import os, zipfile
{code}
def build_wheel(out, settings=None, metadata=None):
    name = "{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(out, name), "w") as wheel:
        wheel.writestr("{name}/__init__.py", "MADE = 1\\n")
        info = "{name}-{version}.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n{metadata}")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "{name}/__init__.py,,\\n" + info + "METADATA,,\\n" + info + "WHEEL,,\\n"
                       + info + "RECORD,,\\n")
    return name
"""


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str] = {}) -> Path:
    """A wheel with these files."""
    plain = name.replace("-", "_")
    path, info = folder / f"{plain}-{version}-py3-none-any.whl", f"{plain}-{version}.dist-info"
    texts = {f"{plain}/__init__.py": "", **files,
             f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    texts[f"{info}/RECORD"] = "".join(f"{one},,\n" for one in [*texts, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as packed:
        for one, text in texts.items():
            packed.writestr(one, text)
    return path


def sdist(folder: Path, name: str, version: str, code: str = "", requires: str = "[]", metadata: str = "",
          files: Mapping[str, str] = {}) -> Path:
    """A package that exists only as source, built by a backend of its own that runs ``code`` when it is loaded."""
    path = folder / f"{name}-{version}.tar.gz"
    texts = {"PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
             "pyproject.toml": f"[build-system]\nrequires = {requires}\n"
                               'build-backend = "backend"\nbackend-path = ["."]\n',
             "backend.py": BACKEND.format(code=code, name=name, version=version, metadata=metadata), **files}
    with tarfile.open(path, "w:gz") as archive:
        for one, text in texts.items():
            info = tarfile.TarInfo(f"{name}-{version}/{one}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is to install from."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, version in SERVER.items():
        wheel(folder, name, version)
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    config = tmp_path / "uv.toml"
    config.write_text("no-index = true\n")
    monkeypatch.setenv("UV_CONFIG_FILE", str(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    return folder


@pytest.fixture(scope="session")
def sandboxed() -> None:
    """Only where the kernel lets us make a sandbox; MODELYARD_REQUIRE=sandbox makes its absence a failure."""
    if trouble := sandbox.trouble():
        (pytest.fail if "sandbox" in required() else pytest.skip)(trouble)
