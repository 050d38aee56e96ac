"""Input that is meant to harm goes through real registrations and builds: nothing of it runs in the control plane,
nothing is written outside of the data folder."""

import bz2
import gzip
import io
import lzma
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from modelyard.core.errors import BuildFailed
from modelyard.image_builder import uv
from modelyard.image_builder.log import BuildLog
from modelyard.image_builder.request import own_platform, own_python
from modelyard.image_builder.sandbox import Limits
from modelyard.image_builder.sdists import Sdists
from modelyard.kernel.cache import Cache
from tests.lanes import slow_but
from tests.unit.core.test_archives import END, HOSTILE, hostile

from .conftest import SCORE, Yard
from .packages import index, sandboxed, sdist, wheel  # noqa: F401  (fixtures)

# -- pickles ----------------------------------------------------------------------------------------------------------


def call(module: str, name: str, *arguments: str) -> bytes:
    """Protocol 2: ``module.name(*arguments)`` when it is loaded, then None."""
    given = b"".join(b"X" + len(a.encode()).to_bytes(4, "little") + a.encode() for a in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + given + b"tR0N."


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def pickles(shell: str, python: str) -> dict[str, bytes]:
    """Ways to have code run by unpickling, also those that scanners have been known to miss."""
    system = call("os", "system", shell)
    told = b"X" + len(shell).to_bytes(4, "little") + shell.encode()
    return {
        "os.system": system,
        "posix.system": call("posix", "system", shell),
        "subprocess": call("subprocess", "getoutput", shell),
        "exec": call("builtins", "exec", python),
        "eval": call("builtins", "eval", f"exec({python!r})"),
        "compatible names": call("__builtin__", "exec", python),
        "pty": call("pty", "spawn", "/bin/true")[:-3] + b"0" + system[2:],
        "runpy": call("timeit", "timeit", "pass", python),
        "bdb": call("code", "compile_command", python)[:-3] + b"0" + system[2:],
        "stack global": b"\x80\x04" + short("os") + short("system") + b"\x93" + b"(" + told + b"tR.",
        "dotted name": b"\x80\x04" + short("os") + short("system") + b"\x93\x94" + b"(" + told + b"tR.",
        "framed": b"\x80\x04\x95" + (len(system) - 2).to_bytes(8, "little") + system[2:],
        "broken after it": system[:-2] + b"\xffbroken.",
        "two in one": b"\x80\x02N." + system,
        "memoized": b"\x80\x02cos\nsystem\nq\x000h\x00(" + told + b"tR.",
        "instance": b"\x80\x02(" + told + b"ios\nsystem\n.",
        "object": b"\x80\x02(cos\nsystem\n" + told + b"o.",
        "zlib": zlib.compress(system), "gzip": gzip.compress(system), "bzip2": bz2.compress(system),
        "xz": lzma.compress(system),
    }


def springs(data: bytes) -> bool:
    """Whether loading it runs its code, in a process that may be harmed."""
    code = ("import sys, pickle, zlib, gzip, bz2, lzma\nraw = sys.stdin.buffer.read()\n"
            "for way in (bytes, zlib.decompress, gzip.decompress, bz2.decompress, lzma.decompress):\n"
            "    try:\n        file = __import__('io').BytesIO(way(raw))\n        pickle.load(file)\n"
            "        pickle.load(file)\n    except Exception: pass\n")
    subprocess.run([sys.executable, "-c", code], input=data, timeout=60, capture_output=True)
    return True


@pytest.mark.slow
async def test_no_pickle_is_loaded_by_registering_or_building(yard: Yard, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    made = pickles(f"touch {canary}", f"open({str(canary)!r}, 'w').close()")
    assert len(made) > 20
    kinds = [("scikit-learn", "model.joblib"), ("scikit-learn", "model.pkl"), ("lightgbm", "model.joblib"),
             ("xgboost", "model.pickle"), ("pytorch", "model.pt"), ("custom", "model.bin")]
    refused, models = [], []
    for number, (name, data) in enumerate(made.items()):
        framework, filename = kinds[number % len(kinds)]
        body = {"name": f"m{number}", "artifact": await yard.upload(data), "framework": framework, "trusted": True,
                "filename": filename}
        answer = await yard.call("POST", "/v1/models", body)
        assert answer.status in (201, 422), (name, answer)
        (models if answer.status == 201 else refused).append(f"m{number}")
    assert len(models) > 15, refused
    empty = await yard.upload(b"")
    doc = await yard.small("every-one", models=models)
    assert doc["phase"] == "ready", doc
    served = [m for m in models if kinds[int(m[1:]) % len(kinds)][0] in ("scikit-learn", "lightgbm", "xgboost")]
    flavoured = await yard.over((await yard.post(name="flavoured", models=served, lock=empty))["id"])
    assert flavoured["phase"] == "ready", flavoured
    assert (await yard.call("GET", "/v1/images/flavoured/context")).status == 200
    assert not canary.exists()
    for name, data in made.items():  # each of them is as dangerous as it looks
        assert springs(data) and canary.exists(), name
        canary.unlink()


async def test_folders_with_pickles_are_not_loaded_either(yard: Yard, tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "model"
    folder.mkdir()
    (folder / "model.pkl").write_bytes(call("os", "system", f"touch {canary}"))
    (folder / "MLmodel").write_text("flavors:\n  sklearn:\n    pickled_model: model.pkl\n"
                                    f"signature: !!python/object/apply:os.system ['touch {canary}']\n")
    (folder / "conftest.py").write_text(f"open({str(canary)!r}, 'w')\n")
    with zipfile.ZipFile(folder / "model.skops", "w") as packed:
        packed.writestr("schema.json", '{"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"}')
        packed.writestr("../../canary", "x")
    digest = await yard.upload_folder(folder)
    answer = await yard.call("POST", "/v1/models", {
        "name": "flow", "artifact": digest, "framework": "mlflow", "unpack": True, "trusted": True})
    assert answer.status in (201, 422), answer
    skops = await yard.call("POST", "/v1/models", {
        "name": "zipped", "artifact": await yard.upload((folder / "model.skops").read_bytes()),
        "framework": "scikit-learn", "filename": "model.skops"})
    assert skops.status == 201, skops
    for name in ["flow"] * (answer.status == 201) + ["zipped"]:
        doc = await yard.over((await yard.post(name=f"of-{name}", models=[name], lock=await yard.upload(b"")))["id"])
        assert doc["phase"] in ("ready", "failed") and "Traceback" not in (doc["reason"] or ""), doc
    assert not canary.exists()


# -- archives ---------------------------------------------------------------------------------------------------------


def outside(tmp_path: Path) -> list[str]:
    """Files beside the data folder, and one that the archives name."""
    return sorted(p.name for p in tmp_path.iterdir()) + [p.name for p in Path("/tmp").glob("modelyard-outside*")]


@pytest.mark.slow
async def test_no_hostile_archive_leaves_its_place(yard: Yard, tmp_path: Path) -> None:
    before = outside(tmp_path)
    for name in HOSTILE:
        raw = hostile(name)
        if name in ("no tar", "zip", "empty") or not raw:
            continue  # as a scoring file: a text that does not parse
        whole = raw if name in ("no end", "cut in a header", "size beyond the end", "huge size") else raw + END
        digest = await yard.upload(whole)
        answer = await yard.call("POST", "/v1/models", {"name": "tree", "artifact": digest, "unpack": True})
        assert answer.status == 422, name
        doc = await yard.small("score-tree", score=digest)
        assert doc["phase"] == "failed" and "scor" in doc["reason"] and "Traceback" not in doc["reason"], (name, doc)
    assert outside(tmp_path) == before
    assert [*(tmp_path / "data").glob("image-builder/tmp/*")] == []


def tampered(change: Callable[[tarfile.TarFile], None]) -> Callable[[Path], None]:
    """An sdist with something beside its own files."""
    def make(path: Path) -> None:
        plain = gzip.decompress(path.read_bytes())
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(plain)) as old, tarfile.open(fileobj=out, mode="w") as new:
            for info in old:
                new.addfile(info, old.extractfile(info))
            change(new)
        path.write_bytes(gzip.compress(out.getvalue(), 1))

    return make


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Callable[[Path], None]:
    return tampered(lambda archive: _add(archive, name, kind, link, size))


def _add(archive: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    archive.addfile(info, io.BytesIO(bytes(size)) if size else None)


def through(archive: tarfile.TarFile) -> None:
    _add(archive, "foo-1.0/link", tarfile.SYMTYPE, "../../../usr")
    _add(archive, "foo-1.0/link/x", size=1)


def many(archive: tarfile.TarFile) -> None:
    for n in range(3000):
        _add(archive, f"foo-1.0/{n}")


SDISTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "parent": (entry("foo-1.0/../../../outside", size=1), "outside"),
    "absolute": (entry("/tmp/modelyard-outside", size=1), "no sdist|one folder|absolute"),
    "symbolic link": (entry("foo-1.0/link", tarfile.SYMTYPE, "/etc/passwd"), "link|absolute"),
    "link, then through it": (tampered(through), "link|outside"),
    "hard link": (entry("foo-1.0/link", tarfile.LNKTYPE, "/etc/passwd"), "link|absolute"),
    "device": (entry("foo-1.0/null", tarfile.CHRTYPE), "special"),
    "bomb": (entry("foo-1.0/zeros", size=100_000_000), "it filled|No space|to a file|File too large"),
    "many files": (tampered(many), "it filled|No space"),
    "no gzip": (lambda path: path.write_bytes(b"hello" * 100) and None, "not be opened|not a gzip|ReadError"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]) and None, "ended before|EOF|end of"),
    "two folders": (entry("other/x", size=1), "no sdist"),
    "no build file": (lambda path: _bare(path), "no sdist"),
}


def _bare(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("foo-1.0/readme")
        archive.addfile(info)


@pytest.mark.parametrize("name", slow_but({"parent"}, SDISTS))
async def test_a_hostile_sdist_is_refused(
        name: str, index: Path, tmp_path: Path, sandboxed: None) -> None:  # noqa: F811
    path, folder = sdist(index, "foo", "1.0"), tmp_path / "build"
    make, told = SDISTS[name]
    make(path)
    folder.mkdir()
    before = {*outside(tmp_path), "log"}

    async def here() -> Path:
        return folder

    build = Sdists(own_python(), own_platform(), BuildLog(tmp_path / "log"), Cache(tmp_path / "cache"), here, (),
                   Limits(memory=200 << 20, disk=32 << 20, files=1000))
    with pytest.raises(BuildFailed) as failed:
        await build.add(uv.Sdist("foo", "1.0", path.name, path.as_uri(), ""), None)
    log = (tmp_path / "log").read_text()
    assert re.search(told, failed.value.message + log), log
    assert {*outside(tmp_path)} <= before and [*folder.rglob("*.whl")] == [] and build.made == {}


def zipped(name: str, link: str = "") -> Callable[[Path], None]:
    """A wheel with one more file, or a symbolic link."""
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as packed:
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | 0o777) << 16
            packed.writestr(info, link or "x")

    return make


WHEELS: dict[str, Callable[[Path], None]] = {
    "parent": zipped("../../outside"), "absolute": zipped("/tmp/modelyard-outside"),
    "backslashes": zipped("..\\..\\outside"), "data that leads out": zipped("foo-1.0.data/data/../../../../outside"),
    "a symbolic link": zipped("foo/link", "/etc/passwd"), "a long name": zipped("foo/" + "n" * 300),
    "a script beside": zipped("foo-1.0.data/scripts/../../../outside"),
}


@pytest.mark.parametrize("name", slow_but({"parent", "a symbolic link"}, WHEELS))
async def test_a_hostile_wheel_writes_nothing_outside(
        name: str, index: Path, yard: Yard, tmp_path: Path) -> None:  # noqa: F811
    WHEELS[name](wheel(index, "foo", "1.0"))
    before = {*outside(tmp_path), "uv", "cache"}
    doc = await yard.over((await yard.post(
        name="hostile", score=await yard.upload(SCORE), requirements=["foo==1.0"]))["id"])
    assert doc["phase"] in ("failed", "ready") and "Traceback" not in (doc["reason"] or ""), doc
    assert {*outside(tmp_path)} <= before and [*(tmp_path / "data").glob("image-builder/tmp/*")] == []
    assert [*(tmp_path / "data").rglob("outside")] == []
