"""Keys are a published contract: other programs read these folders."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from modelyard.core import layout
from modelyard.core.errors import Invalid

HOUR = datetime(2026, 11, 23, 14, 5, tzinfo=UTC)
REPLICA = "0-1a2b3c4d"


def test_keys_of_the_default_workspace() -> None:
    digest = "ab" * 32
    assert layout.artifact_key("default", f"sha256:{digest}") == f"artifacts/sha256/ab/{digest}"
    assert layout.image_key("default", "iris-scorer:7", "lock") == "images/iris-scorer/7/lock"
    assert layout.parquet_key("default", "iris", "iris-scorer:7", HOUR, REPLICA, 1, 90) == \
        f"capture/iris/iris-scorer/7/date=2026-11-23/hour=14/{REPLICA}-1-90.parquet"
    assert layout.collector_key("default", "iris", "iris-scorer:7", "features", HOUR, REPLICA, 1, 2) == \
        f"capture/iris/iris-scorer/7/collect=features/date=2026-11-23/hour=14/{REPLICA}-1-2.parquet"
    assert layout.segment_key("default", "iris", REPLICA, 7) == f"capture/iris/.segments/{REPLICA}-00000007.seg"


def test_another_workspace_lies_under_its_name() -> None:
    assert layout.capture_prefix("lab", "iris") == "workspaces/lab/capture/iris/"
    assert layout.image_prefix("lab", "a:1") == "workspaces/lab/images/a/1/"


def test_hours_are_utc() -> None:
    east = HOUR.astimezone(timezone(timedelta(hours=11)))
    assert "date=2026-11-23/hour=14/" in layout.parquet_key("default", "iris", "i:1", east, REPLICA, 1, 1)


def test_segments_names_sort_and_parse() -> None:
    names = [layout.segment_name(REPLICA, n) for n in (0, 9, 10, 99_999_999)]
    assert names == sorted(names)
    assert [layout.parse_segment(f"a/b/{name}") for name in names] == [(REPLICA, n) for n in (0, 9, 10, 99_999_999)]
    assert layout.parse_segment("0-1a2b3c4d-1.seg") is None and layout.parse_segment("x.seg") is None


def test_a_copy_of_a_segment_is_read_as_that_segment() -> None:
    copy = layout.copy_name(layout.segment_name(REPLICA, 7), "5e6f7a8b")
    assert copy == f"{REPLICA}-00000007-a5e6f7a8b.seg"
    assert layout.parse_segment(f"capture/iris/.segments/{copy}") == (REPLICA, 7)
    assert layout.parse_segment(copy.replace("-a", "-b")) is None


@pytest.mark.parametrize("image", ["iris", "iris:0", "iris:x", "../a:1", "a/b:1", "", ":1"])
def test_an_image_needs_its_version(image: str) -> None:
    with pytest.raises(Invalid):
        layout.image_key("default", image, "lock")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a..b", "x" * 65, "a\n"])
def test_collectors_names_are_safe_in_a_key(name: str) -> None:
    with pytest.raises(Invalid):
        layout.collector_key("default", "iris", "i:1", name, HOUR, REPLICA, 1, 1)


@pytest.mark.parametrize("digest", ["", "sha256:ab", "md5:" + "a" * 64, "sha256:" + "A" * 64,
                                    "sha256:" + "a" * 64 + "\n"])
def test_digests_are_whole(digest: str) -> None:
    with pytest.raises(Invalid):
        layout.artifact_key("default", digest)
