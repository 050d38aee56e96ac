"""CaptureGrants on Azure: a create-only SAS on the container of one deployment's capture.

With the account's key the SAS names a policy that is stored with the container: renewing moves the policy's end and
keeps the URL, revoking takes the policy away (Azure says that this may take 30 seconds to reach every server). With
DefaultAzureCredential it is signed by a user delegation key, ends by itself, and cannot be revoked before.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from weakref import WeakValueDictionary

from azure.core import exceptions as azure
from azure.storage.blob import AccessPolicy, ContainerSasPermissions, generate_container_sas
from azure.storage.blob.aio import ContainerClient

from ..core.layout import segments_prefix
from ..ports.blobs import CaptureGrants
from .blobs_azure import AzureBlobs
from .blobs_azure_link import Link
from .blobs_dir import check_key

SKEW = timedelta(minutes=5)
"""A user delegation SAS begins that much in the past: clocks differ."""
REVOKED = "revoked"


class AzureGrants(CaptureGrants):
    """Opened by ``AzureGrants.open`` with the URL of the blob store."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._alone: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    async def open(cls, url: str, *, timeout_s: float = 20.0) -> AzureGrants:
        """As ``AzureBlobs.open``."""
        return cls(await Link.open(url, timeout_s))

    async def check(self) -> None:
        await AzureBlobs(self._link).check()

    async def close(self) -> None:
        await self._link.close()

    async def lend(self, workspace: str, deployment: str, seconds: int) -> str:
        check_key(f"{workspace}/{deployment}")
        name, about = self._link.capture(workspace, deployment)
        container = await self._link.container(name, about)
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        with self._link.ours(f"a grant for '{deployment}'"):
            token = await self._signed(container, until)
        return f"{container.url}?{token}#{quote(segments_prefix(workspace, deployment))}"

    async def revoke(self, workspace: str, deployment: str) -> None:
        check_key(f"{workspace}/{deployment}")
        name, _ = self._link.capture(workspace, deployment)
        container = self._link.client.get_container_client(name)
        async with self._lock(name):
            with self._link.ours(f"the end of the grant for '{deployment}'"):
                try:
                    about = dict((await container.get_container_properties()).metadata or {})
                    about[REVOKED] = str(int(about.get(REVOKED, "0")) + 1)
                    await container.set_container_metadata(about)
                    await container.set_container_access_policy({})
                except azure.ResourceNotFoundError:
                    return  # never lent

    async def _signed(self, container: ContainerClient, until: datetime) -> str:
        where = self._link.place
        if where.key is None:
            key = await self._link.client.get_user_delegation_key(datetime.now(UTC) - SKEW, until)
            return generate_container_sas(
                where.account, container.container_name, user_delegation_key=key, start=datetime.now(UTC) - SKEW,
                permission=ContainerSasPermissions(create=True), expiry=until)
        async with self._lock(container.container_name):
            policy = await self._policy(container, until)
        return generate_container_sas(where.account, container.container_name, account_key=where.key, policy_id=policy)

    async def _policy(self, container: ContainerClient, until: datetime) -> str:
        """The name of the policy, stored and good until then at least. It tells how often the grant was revoked, so
        that lenders in two processes mean the same one and none comes to life again."""
        about = (await container.get_container_properties()).metadata or {}
        name = f"capture-{about.get(REVOKED, '0')}"
        stored: dict[str, Any] = {item.id: item.access_policy
                                  for item in (await container.get_container_access_policy())["signed_identifiers"]}
        old = stored.get(name)
        if old is None or _moment(old.expiry) < until:
            ends = until.strftime("%Y-%m-%dT%H:%M:%S.%f0Z")  # the driver would cut a datetime to seconds
            await container.set_container_access_policy(
                {name: AccessPolicy(permission=ContainerSasPermissions(create=True), expiry=ends)})
        return name

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._alone.get(name)
        if lock is None:
            self._alone[name] = lock = asyncio.Lock()
        return lock


def _moment(text: Any) -> datetime:
    if isinstance(text, datetime):
        return text if text.tzinfo else text.replace(tzinfo=UTC)
    if not text:
        return datetime.min.replace(tzinfo=UTC)
    whole, _, part = str(text).removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{part[:6]:0<6}").replace(tzinfo=UTC)
