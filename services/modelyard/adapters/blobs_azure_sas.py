"""The shipper's end of a lent SAS. Standard library only (beside the error tree): it is baked into scoring images."""

from __future__ import annotations

import asyncio
import http.client
import secrets
from urllib.parse import quote, unquote, urlsplit

from ..core.errors import Denied, Invalid, Unavailable
from ..core.layout import copy_name
from .blobs_dir import check_key

TIMEOUT_S = 60.0
TAKEN = ("BlobAlreadyExists", "UnauthorizedBlobOverwrite")
"""An earlier try of the same segment, whose answer was lost, has the name."""
UNCLEAR = "AuthorizationPermissionMismatch"
"""Azurite says so of a name that is taken, and Azure of a grant that may not create (any more). Whoever took one for
the other would delete a segment that is nowhere: it goes up once more under a name of its own; readers count one."""
VERSION = "2021-12-02"


class SasGrant:
    """``https://HOST/CONTAINER?SAS#PREFIX``: one Put Blob an object: a create-only SAS may not write block lists."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "sig=" not in parts.query \
                or not parts.fragment:
            raise Invalid("a grant of Azure Blob Storage is https://HOST/CONTAINER?SAS#PREFIX")
        self._prefix = unquote(parts.fragment).rstrip("/")
        check_key(self._prefix)
        self._secure, self._host, self._path, self._sas = parts.scheme == "https", parts.netloc, parts.path, parts.query

    async def put(self, name: str, data: bytes) -> bool:
        """Stores ``data`` under a new name; False when the name is taken (what is there stays).

        Raises Denied when the grant lapsed or was revoked, Invalid for a name with '/', Unavailable otherwise.
        """
        if "/" in name:
            raise Invalid(f"'{name}' is not the name of a new object: '/' has no place in it")
        check_key(name)
        status, code = await asyncio.to_thread(self._send, name, data)
        if status == 201:
            return True
        if code == UNCLEAR:
            status, code = await asyncio.to_thread(self._send, copy_name(name, secrets.token_hex(4)), data)
            if status == 201:
                return False
        if code in TAKEN or status == 412:
            return False
        if status in (401, 403, 404):
            raise Denied(f"this grant has lapsed or was revoked ({code or status}); its lender may renew it")
        if status == 400:
            raise Invalid(f"the blob store refuses '{name}' ({code or status})")
        raise Unavailable(f"the blob store answers {status} {code}")

    def _send(self, name: str, data: bytes) -> tuple[int, str]:
        """(status, Azure's error code)"""
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        wire = make(self._host, timeout=TIMEOUT_S)
        path = f"{self._path}/{quote(f'{self._prefix}/{name}')}?{self._sas}"
        try:
            wire.request("PUT", path, data, {"x-ms-blob-type": "BlockBlob", "x-ms-version": VERSION,
                                             "If-None-Match": "*", "Content-Length": str(len(data))})
            answer = wire.getresponse()
            answer.read()
            return answer.status, answer.headers.get("x-ms-error-code", "")
        except (OSError, http.client.HTTPException) as exc:
            raise Unavailable(f"the blob store does not answer: {type(exc).__name__}") from exc
        finally:
            wire.close()
