"""The blob folder's adapter is baked into scoring images, where nothing is installed beside it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from modelyard.adapters.blobs_dir import DirBlobs, DirGrants

SHIP = """
import sys
sys.path.insert(0, sys.argv[1])
import asyncio
from modelyard.adapters.blobs_dir import open_grant
print(asyncio.run(open_grant(sys.argv[2]).put("0-1a2b3c4d-00000001.seg", b"segment")))
outside = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__", "modelyard"}
assert not outside, outside
"""


async def test_a_grant_is_used_with_the_standard_library_only(tmp_path: Path) -> None:
    import modelyard

    url = await DirGrants(tmp_path).lend("default", "iris", 60)
    source = str(Path(modelyard.__file__).parent.parent)
    ran = await asyncio.to_thread(subprocess.run, [sys.executable, "-I", "-S", "-c", SHIP, source, url],
                                  capture_output=True, text=True, timeout=60)
    assert ran.stdout == "True\n", ran.stderr
    assert [blob.key async for blob in DirBlobs(tmp_path).list()] == [
        "capture/iris/.segments/0-1a2b3c4d-00000001.seg"]
