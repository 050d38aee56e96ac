"""Where blobs lie: the only place that knows a blob's key.

Keys of workspace ``default`` start at the root; another workspace's lie under ``workspaces/<name>/``.
Standard library only: the scoring server's side reads it too.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import NamedTuple

from .errors import Invalid

DIGEST = re.compile(r"^sha256:([0-9a-f]{64})\Z")
IMAGE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._\-]*):([1-9][0-9]*)\Z")
REPLICA = re.compile(r"^[0-9]{1,6}-[0-9a-f]{8}\Z")
"""One life of one scoring server process: its ordinal and eight random hexadecimal digits."""
COLLECTOR_NAME = re.compile(r"^[A-Za-z0-9](?:[A-Za-z0-9_\-]|\.(?=[A-Za-z0-9_\-])){0,63}\Z")
SEGMENT_NAME = re.compile(r"^([0-9]{1,6}-[0-9a-f]{8})-([0-9]{8,12})(?:-a[0-9a-f]{8})?\.seg\Z")


class SegmentName(NamedTuple):
    """``0-1a2b3c4d-00000007.seg`` → replica ``0-1a2b3c4d``, number 7; of a copy the same."""

    replica: str
    number: int


def workspace_prefix(workspace: str) -> str:
    """``""`` for ``default``, else ``workspaces/<name>/``."""
    return "" if workspace == "default" else f"workspaces/{workspace}/"


def artifact_key(workspace: str, digest: str) -> str:
    """``artifacts/sha256/ab/abcd…``. Raises Invalid for what is not a digest."""
    found = DIGEST.match(digest)
    if found is None:
        raise Invalid(f"'{digest}' is not a digest; write sha256: and 64 lower-case hexadecimal digits", field="digest")
    return f"{workspace_prefix(workspace)}artifacts/sha256/{found[1][:2]}/{found[1]}"


def image_prefix(workspace: str, image_id: str) -> str:
    """``images/iris-scorer/7/``: everything kept about the building of ``iris-scorer:7``."""
    return f"{workspace_prefix(workspace)}images/{_versioned(image_id)}/"


def image_key(workspace: str, image_id: str, name: str) -> str:
    """``images/iris-scorer/7/<name>``: one build input or result (spec, lock, log, sbom …)."""
    return image_prefix(workspace, image_id) + name


def capture_prefix(workspace: str, deployment: str) -> str:
    """``capture/<deployment>/``: everything captured from a deployment."""
    return f"{workspace_prefix(workspace)}capture/{deployment}/"


def segments_prefix(workspace: str, deployment: str) -> str:
    """``capture/<deployment>/.segments/``: raw segments on their way; what a capture grant may write under."""
    return f"{capture_prefix(workspace, deployment)}.segments/"


def segment_name(replica: str, number: int) -> str:
    """``<replica>-<number>.seg``; names of one replica sort by number."""
    return f"{replica}-{number:08d}.seg"


def copy_name(name: str, mark: str) -> str:
    """``0-1a2b3c4d-00000007-a5e6f7a8b.seg``: the same segment, sent once more under a name that nobody took. ``mark``:
    eight hexadecimal digits. Whoever reads both counts one."""
    stem, dot, kind = name.rpartition(".")
    return f"{stem}-a{mark}.{kind}" if dot else f"{name}-a{mark}"


def segment_key(workspace: str, deployment: str, replica: str, number: int) -> str:
    """The key of one raw segment."""
    return segments_prefix(workspace, deployment) + segment_name(replica, number)


def parse_segment(key_or_name: str) -> SegmentName | None:
    """Replica and number of a raw segment's key or name; None for anything else."""
    found = SEGMENT_NAME.match(key_or_name.rpartition("/")[2])
    return SegmentName(found[1], int(found[2])) if found else None


def parquet_key(workspace: str, deployment: str, image: str, hour: datetime, replica: str,
                first: int, last: int) -> str:
    """``capture/<deployment>/<image name>/<version>/date=2026-11-23/hour=14/<replica>-<first>-<last>.parquet``."""
    return (f"{capture_prefix(workspace, deployment)}{_versioned(image)}/{_partition(hour)}"
            f"{replica}-{first}-{last}.parquet")


def collector_key(workspace: str, deployment: str, image: str, collector: str, hour: datetime, replica: str,
                  first: int, last: int) -> str:
    """As ``parquet_key``, below ``collect=<name>/``: rows that a scoring file collected itself."""
    if not COLLECTOR_NAME.match(collector):
        raise Invalid(f"'{collector}' is not a collector's name; use 1-64 letters, digits, '-', '_', '.'")
    return (f"{capture_prefix(workspace, deployment)}{_versioned(image)}/collect={collector}/{_partition(hour)}"
            f"{replica}-{first}-{last}.parquet")


def _partition(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("date=%Y-%m-%d/hour=%H/")


def _versioned(image: str) -> str:
    """``iris-scorer:7`` → ``iris-scorer/7``. Without a version there is no such folder: Invalid."""
    found = IMAGE.match(image)
    if found is None:
        raise Invalid(f"'{image}' is not an image with a version", field="image")
    return f"{found[1]}/{found[2]}"
