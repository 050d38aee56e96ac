"""Opens what a CaptureGrants lent, whichever it was. Standard library only: it is baked into scoring images."""

from __future__ import annotations

from .blobs_azure_sas import SasGrant
from .blobs_dir import DirGrant
from .blobs_dir import open_grant as open_folder


def open_grant(url: str) -> DirGrant | SasGrant:
    """The grant behind a URL that ``lend`` gave. Raises Invalid for anything else."""
    return SasGrant(url) if url.startswith(("http://", "https://")) else open_folder(url)
