"""Test suites stay out of images unless something imports them; layers are gzipped in members of one size."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import pytest

from modelyard.image_builder import context, store, suites
from modelyard.image_builder.model import Image
from modelyard.image_builder.tarring import MEMBER, write_layer
from modelyard.image_builder.wheels import distributions

from .conftest import Yard


def installed(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SUITE = {"pkg/__init__.py": "", "pkg/a.py": "", "pkg/tests/__init__.py": "", "pkg/tests/test_a.py": "import pkg\n",
         "pkg/tests/data/x.csv": "1", "pkg/sub/tests/test_b.py": "import pytest\n"}


@pytest.mark.parametrize(("more", "left"), [
    ({}, {"pkg/tests", "pkg/sub/tests"}),
    ({"pkg/a.py": "# from pkg.tests import test_a\n"}, {"pkg/tests", "pkg/sub/tests"}),
    ({"pkg/a.py": "from .tests import test_a\n"}, {"pkg/sub/tests"}),
    ({"pkg/a.py": "from . import tests\n"}, {"pkg/sub/tests"}),
    ({"pkg/a.py": "def late():\n    import pkg.tests.test_a\n"}, {"pkg/sub/tests"}),
    ({"pkg/a.py": "import importlib\nimportlib.import_module('pkg.tests.test_a')\n"}, {"pkg/sub/tests"}),
    ({"pkg/a.py": "import importlib\nimportlib.import_module('.tests.test_a', __package__)\n"}, {"pkg/sub/tests"}),
    ({"other/__init__.py": "from pkg.tests.test_a import x\n"}, {"pkg/sub/tests"}),
    ({"pkg/a.py": "import not_here\nfrom pkg.tests import test_a\n"}, {"pkg/tests", "pkg/sub/tests"}),
    ({"pkg/a.py": "from pkg.sub.tests.test_b import x\n"}, {"pkg/tests", "pkg/sub/tests"}),
    ({"pkg/a.py": "from pkg.sub.tests.test_b import x\n", "pytest/__init__.py": ""}, {"pkg/tests"}),
    ({"pkg/a.py": "from .tests import test_a\n", "pkg/tests/test_a.py": "from pkg.sub.tests import x\n"}, set()),
    ({"tests/test_top.py": "", "api/tests/__init__.py": "", "api/tests/runner.py": ""}, {"pkg/tests", "pkg/sub/tests"}),
    ({"pkg/a.py": "from pkg.tests import {{ x }}\n"}, {"pkg/tests", "pkg/sub/tests"}),
])
def test_what_is_left_out(tmp_path: Path, more: dict[str, str], left: set[str]) -> None:
    assert suites.unused(installed(tmp_path, {**SUITE, **more})) == left


def test_the_record_tells_what_is_there(tmp_path: Path) -> None:
    installed(tmp_path, {**SUITE, "pkg-1.dist-info/METADATA": "Name: pkg\nVersion: 1\n"})
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    (tmp_path / "pkg-1.dist-info" / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    (one,) = distributions(tmp_path, "3.11", suites.unused(tmp_path))
    there = {entry.name.partition("site-packages/")[2]: entry.source for entry in one.entries}
    assert there.keys() == {"pkg/__init__.py", "pkg/a.py", "pkg-1.dist-info/METADATA", "pkg-1.dist-info/RECORD"}
    record = there["pkg-1.dist-info/RECORD"]
    assert isinstance(record, bytes) and {row.split(",")[0] for row in record.decode().split()} == there.keys()


def test_a_layer_is_the_same_however_its_tar_comes(tmp_path: Path) -> None:
    data = os.urandom(1000) * (MEMBER // 400)
    made = []
    for step in (len(data), 1 << 20, 65_537):
        out = io.BytesIO()
        layer = write_layer("x", (data[at:at + step] for at in range(0, len(data), step)), out, gzip=True)
        assert gzip.decompress(out.getvalue()) == data and layer.size == len(out.getvalue())
        made.append((layer, out.getvalue()))
    assert made[0] == made[1] == made[2]


async def test_a_build_context_has_all_members_of_a_layer(yard: Yard) -> None:
    plain, out = os.urandom(1000) * (MEMBER // 400), io.BytesIO()
    layer = write_layer("x", [plain], out, gzip=True)
    doc = Image(id="some:1", name="some", version=1, platform="linux/amd64", workspace="default")
    await yard.images.images.put_blob(doc.repo, layer.digest, store.Chunks(out.getvalue()))
    assert b"".join([chunk async for chunk in context._plain(yard.images, doc, layer.descriptor)]) == plain
