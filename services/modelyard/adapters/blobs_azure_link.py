"""The way to a storage account: who we are there, what its errors mean, and which container a key lies in.

The capture of a deployment is a container of its own, for a SAS cannot be limited to a prefix; everything else lies in
the container that the URL names. A blob's name is its key in either.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from azure.core import exceptions as azure
from azure.storage.blob.aio import BlobServiceClient, ContainerClient, ExponentialRetry

from ..core.errors import Invalid, Unavailable

CONTAINER = re.compile(r"^(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]\Z")
CAPTURE = re.compile(r"^(?:workspaces/(?P<workspace>[^/]+)/)?capture/(?P<deployment>[^/]+)/")
FORM = "azure://[ACCOUNT:KEY@]HOST[:PORT][/ACCOUNT]/CONTAINER"
CONNECT_S = 5.0


@dataclass(frozen=True)
class Place:
    """What the URL says: where the account answers, its name and key (or None), and the container."""

    address: str
    account: str
    key: str | None
    container: str


def place(url: str) -> Place:
    """``azure://ACCOUNT.blob.core.windows.net/CONTAINER`` (https), or with the account in the path, as emulators on
    loopback have it (http). The key: of the URL, else of AZURE_STORAGE_KEY or AZURE_STORAGE_CONNECTION_STRING, else
    None. Raises Invalid."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    folders = [unquote(part) for part in parts.path.strip("/").split("/") if part]
    local = host in ("localhost", "127.0.0.1", "::1")
    try:
        address = f"{'http' if local else 'https'}://{host}" + (f":{parts.port}" if parts.port else "")
    except ValueError as exc:
        raise Invalid(f"the port of blobs=azure://{host}:… is not a number from 1 to 65535", field="blobs") from exc
    account = folders[0] if len(folders) == 2 else host.partition(".")[0]
    if len(folders) == 2:
        address += f"/{account}"
    if len(folders) not in (1, 2) or not CONTAINER.match(folders[-1]):
        raise Invalid(f"blobs=azure://{host}{parts.path} names no container; write {FORM}, the container of 3 to 63 "
                      "lower-case letters, digits and single '-'", field="blobs")
    key = unquote(parts.password) if parts.password else _environ("AZURE_STORAGE_KEY") or _connection("AccountKey")
    if key is None and (sas := _connection("SharedAccessSignature")):
        raise Invalid(f"blobs={address}: AZURE_STORAGE_CONNECTION_STRING holds a SAS{_lapsed(sas)}, with which no "
                      "capture grant can be lent: give one with AccountKey=, or set AZURE_STORAGE_KEY", field="blobs")
    if key is None and local:
        raise Invalid(f"blobs={address}: over http an account's key is needed; write {FORM}, or set AZURE_STORAGE_KEY",
                      field="blobs")
    if key is not None and not _is_key(key):
        raise Invalid(f"blobs={address}: the account's key is not base64, as Azure shows it; in a URL '+', '/' and "
                      "'=' are written %2B, %2F and %3D", field="blobs")
    return Place(address, unquote(parts.username) if parts.username else account, key, folders[-1])


def _lapsed(sas: str) -> str:
    """``, which expired at 2026-…``, or "" for one that holds."""
    end = parse_qs(sas.lstrip("?")).get("se", [""])[0]
    try:
        over = datetime.fromisoformat(end) < datetime.now(UTC)
    except (ValueError, TypeError):
        return ""
    return f" that expired at {end}" if over else ""


def _is_key(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except ValueError:
        return False


def _environ(name: str) -> str | None:
    return os.environ.get(name) or None


def _connection(name: str) -> str | None:
    """One word of AZURE_STORAGE_CONNECTION_STRING."""
    pairs = (part.partition("=") for part in os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"))
    return {word: value for word, _, value in pairs}.get(name) or None


class Link:
    """The account's client and our containers in it."""

    def __init__(self, where: Place, client: BlobServiceClient, credential: Any) -> None:
        self.place, self.client, self._credential = where, client, credential
        self._made: set[str] = set()

    @classmethod
    async def open(cls, url: str, timeout_s: float = 20.0) -> Link:
        """Connects to nothing yet. Raises Invalid, saying how to write the URL."""
        where = place(url)
        return await asyncio.to_thread(cls._opened, where, timeout_s)

    @classmethod
    def _opened(cls, where: Place, timeout_s: float) -> Link:
        credential: Any = None
        if where.key is None:
            from azure.identity.aio import DefaultAzureCredential

            logging.getLogger("azure.identity").setLevel(logging.ERROR)  # else twelve lines for each failed call
            credential = DefaultAzureCredential()
        signed = {"account_name": where.account, "account_key": where.key} if where.key else credential
        client = BlobServiceClient(
            where.address, credential=signed, connection_timeout=CONNECT_S, read_timeout=timeout_s,
            retry_policy=ExponentialRetry(initial_backoff=1, increment_base=1, retry_total=2, random_jitter_range=1),
            max_single_get_size=8 << 20, max_chunk_get_size=8 << 20)
        return cls(where, client, credential)

    async def close(self) -> None:
        await self.client.close()
        if self._credential is not None:
            await self._credential.close()

    async def container(self, name: str, about: dict[str, str] | None = None) -> ContainerClient:
        """A container that is there: made when it is first needed."""
        client = self.client.get_container_client(name)
        if name not in self._made:
            with self.ours(f"the container '{name}'"):
                try:
                    await client.create_container(metadata=about)
                except azure.ResourceExistsError as exc:
                    if error_code(exc) == "ContainerBeingDeleted":
                        raise Unavailable(f"the container '{name}' is being deleted; try again in a minute") from exc
            self._made.add(name)
        return client

    async def of_key(self, key: str, make: bool = False) -> ContainerClient:
        """The container of a key; made when ``make`` is set."""
        name, about = self.container_of(key)
        return await self.container(name, about) if make else self.client.get_container_client(name)

    def container_of(self, key: str) -> tuple[str, dict[str, str] | None]:
        """(container, what it is marked with) of a key, or of a prefix that reaches below one deployment's capture."""
        found = CAPTURE.match(key)
        if found is None:
            return self.place.container, None
        return self.capture(found["workspace"] or "default", found["deployment"])

    def capture(self, workspace: str, deployment: str) -> tuple[str, dict[str, str]]:
        """The container of a deployment's capture. Readable, and a digest keeps two deployments apart."""
        yard = self.place.container
        digest = hashlib.sha256(f"{yard}/{workspace}/{deployment}".encode()).hexdigest()[:12]
        about = {"modelyard": yard, "workspace": workspace.encode().hex(), "deployment": deployment.encode().hex()}
        return f"{self._stem()}-{_plain(deployment)}-{digest}", about

    def _stem(self) -> str:
        return _plain(self.place.container)

    async def captures(self) -> dict[str, str]:
        """Prefix of the keys → container, of every deployment's capture of this yard."""
        found = {}
        with self.ours("the list of containers"):
            async for item in self.client.list_containers(name_starts_with=f"{self._stem()}-", include_metadata=True):
                about = item.metadata or {}
                if about.get("modelyard") != self.place.container:
                    continue
                workspace, deployment = (bytes.fromhex(about[word]).decode() for word in ("workspace", "deployment"))
                inside = "" if workspace == "default" else f"workspaces/{workspace}/"
                found[f"{inside}capture/{deployment}/"] = item.name
        return found

    @contextmanager
    def ours(self, what: str) -> Iterator[None]:
        """The driver's errors become ours, with the line to mend it and never a credential."""
        where = f"{self.place.address} ({what})"
        try:
            yield
        except azure.HttpResponseError as exc:
            raise self._told(exc, where) from exc
        except (azure.AzureError, OSError, TimeoutError) as exc:
            raise Unavailable(f"{where} does not answer: is Azure Blob Storage (or Azurite) running there?") from exc

    def _told(self, exc: azure.HttpResponseError, where: str) -> Unavailable | Invalid:
        """Credentials of ours that are refused are no fault of the caller's, and somebody will put them right."""
        code = error_code(exc) or exc.reason or ""
        if code == "ContainerNotFound":  # somebody took it away: the next call makes it again
            self._made.clear()
        if isinstance(exc, azure.ClientAuthenticationError) or code in ("AuthenticationFailed", "AuthorizationFailure"):
            return Unavailable(f"{where} {self._refusal(code)}", code="denied")
        if exc.status_code == 403:
            return Unavailable(f"{where}: account '{self.place.account}' may not do this ({code}): it needs the role "
                               "Storage Blob Data Contributor, or the account's key", code="denied")
        if exc.status_code in (400, 411, 413):
            return Invalid(f"{where} refuses the request ({code})")
        if exc.status_code == 404 and code != "ContainerNotFound":
            return Unavailable(f"{where}: there is no account '{self.place.account}' there; correct blobs=, {FORM}")
        return Unavailable(f"{where} answers {exc.status_code} {code}; try again")


    def _refusal(self, code: str) -> str:
        if self.place.key is None and not code:
            return (f"has no key of account '{self.place.account}', and nobody is logged in: set AZURE_STORAGE_KEY or "
                    "AZURE_STORAGE_CONNECTION_STRING, or log in (`az login`, a managed identity, AZURE_CLIENT_ID …)")
        return (f"refuses the credentials of account '{self.place.account}' ({code}): give the right key in the URL, "
                "AZURE_STORAGE_KEY or AZURE_STORAGE_CONNECTION_STRING")


def error_code(exc: azure.HttpResponseError) -> str:
    """Azure's own word for what went wrong, or ""."""
    code = getattr(exc, "error_code", None) or ""
    return str(getattr(code, "value", code))


def _plain(name: str) -> str:
    """At most 20 characters that a container's name may have."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:20].strip("-") or "x"
