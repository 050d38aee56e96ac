"""The blob folder's adapter is baked into scoring images, where nothing is installed beside it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.adapters import urls
from tests.backends import Backend, backends, url_of

SHIP = """
import sys
sys.path.insert(0, sys.argv[1])
import asyncio
from modelyard.adapters.grants_lent import open_grant
print(asyncio.run(open_grant(sys.argv[2]).put("0-1a2b3c4d-00000001.seg", b"segment")))
outside = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__", "modelyard"}
assert not outside, outside
"""


@pytest.mark.parametrize("backend", backends("grants"))
async def test_a_grant_is_used_with_the_standard_library_only(backend: Backend, tmp_path: Path) -> None:
    import modelyard

    place = url_of(backend, tmp_path)
    grants, blobs = await urls.open_grants(place), await urls.open_blobs(place)
    url = await grants.lend("default", "iris", 60)
    source = str(Path(modelyard.__file__).parent.parent)
    ran = await asyncio.to_thread(subprocess.run, [sys.executable, "-I", "-S", "-c", SHIP, source, url],
                                  capture_output=True, text=True, timeout=60)
    assert ran.stdout == "True\n", ran.stderr
    assert [blob.key async for blob in blobs.list()] == ["capture/iris/.segments/0-1a2b3c4d-00000001.seg"]
    await grants.close()
    await blobs.close()
