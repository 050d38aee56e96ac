"""A registry that only a proxy can reach, in the open and with TLS; a real one, and a real proxy."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ipaddress
import json
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from infra.stack.registry import Registry
from modelyard.adapters import images_registry_errors_http as errors
from modelyard.adapters.images_registry import RegistryImages
from modelyard.core.errors import Denied, Unavailable
from tests.backends import need
from tests.contract.test_images import chunks, digest, image, read
from tests.gate import Gate
from tests.http_proxy import Proxy, listening, piped

pytestmark = pytest.mark.slow
NAMES = ("https_proxy", "http_proxy", "all_proxy", "no_proxy")
HOST, PLAIN, SECURE = "registry.example", 5000, 443
LAYER = os.urandom(3 << 20)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("registry")
    with Registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


def certified(folder: Path) -> Path:
    """Key and certificate of ``HOST``, its own authority."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.OID_COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
            .add_extension(x509.SubjectAlternativeName([
                x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256()))
    path = folder / "registry.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return path


@pytest.fixture
async def proxy(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    """It knows ``HOST`` on two ports, which nobody else does; the gate before the registry is in the open."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(errors, "FIRST_S", 0.02)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    pem = certified(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pem)

    async def encrypted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await piped((reader, writer), await asyncio.open_connection("127.0.0.1", registry.port))

    async with AsyncExitStack() as stack:
        secure = await stack.enter_async_context(listening(encrypted, tls))
        found = Proxy({f"{HOST}:{PLAIN}": registry.port, f"{HOST}:{SECURE}": secure})
        found.port = await stack.enter_async_context(listening(found.serve))
        yield found


async def opened(stack: AsyncExitStack, url: str, **options: str) -> RegistryImages:
    store = await RegistryImages.open(f"oci://{url}/p{os.urandom(4).hex()}", **options)
    stack.push_async_callback(store.close)
    return store


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "HTTP_PROXY"])
async def test_an_image_goes_through_and_comes_back(
        proxy: Proxy, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    proxy.login = "Basic " + base64.b64encode(b"yard:p@ss").decode()
    monkeypatch.setenv(variable, f"http://yard:p%40ss@127.0.0.1:{proxy.port}")
    secure = variable == "HTTPS_PROXY"
    async with AsyncExitStack() as stack:
        store = await opened(stack, HOST if secure else f"{HOST}:{PLAIN}", **({} if secure else {"tls": "off"}))
        await store.check()
        await image(store, "iris", "1", LAYER)
        assert await read(store, "iris", digest(LAYER)) == LAYER
    methods = {line.partition(" ")[0] for line in proxy.seen}
    assert methods == {"CONNECT"} if secure else {"GET", "HEAD", "POST", "PUT"} <= methods
    assert all(f"{HOST}:{SECURE if secure else PLAIN}" in line for line in proxy.seen)


async def test_what_a_proxy_refuses_is_told_at_once(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://yard:hunter2@127.0.0.1:{proxy.port}")
    proxy.login = "Basic bm9ib2R5"
    async with AsyncExitStack() as stack:
        for store in (await opened(stack, HOST), await opened(stack, f"{HOST}:{PLAIN}", tls="off")):
            before = len(proxy.seen)
            with pytest.raises(Denied, match=r"proxy on the way to registry\.example.* wants credentials") as found:
                await store.put_blob("iris", digest(LAYER), chunks(LAYER))
            assert "hunter2" not in found.value.message and len(proxy.seen) == before + 1
        proxy.login = ""
        with pytest.raises(Denied, match=r"does not let us through \(403\)"):
            await (await opened(stack, "else.example")).check()
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        with pytest.raises(Unavailable, match=r"the proxy on the way to registry\.example does not answer"):
            await (await opened(stack, HOST)).check()


async def test_loopback_goes_past_it_unless_the_url_says_so(
        proxy: Proxy, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    here = f"127.0.0.1:{registry.port}"
    proxy.hosts = {here: registry.port}
    async with AsyncExitStack() as stack:
        await (await opened(stack, here)).check()
        assert proxy.seen == []
        await (await opened(stack, here, proxy=proxy.url)).check()
        assert proxy.seen == [f"GET http://{here}/v2/ HTTP/1.1"]


async def test_tokens_come_through_it_too(
        proxy: Proxy, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry, and the token server that it names; then a token that Docker's config holds ready."""
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    asked: list[str] = []

    def look(request: web.Request) -> web.Response | None:
        if request.path == "/token":
            asked.append(request.headers.get("Authorization", ""))
            return web.json_response({"token": "given"})
        if request.headers.get("Authorization") in ("Bearer given", "Bearer kept"):
            return None
        return web.Response(status=401, headers={
            "WWW-Authenticate": 'Bearer realm="http://tokens.example:80/token",service="yard",scope="repository:x:pull"'})

    config = tmp_path / "config.json"
    async with Gate(registry.port).open() as gate, AsyncExitStack() as stack:
        gate.wants = look
        proxy.hosts = {f"{HOST}:{PLAIN}": gate.port, "tokens.example": gate.port}
        config.write_text(json.dumps({"auths": {f"{HOST}:{PLAIN}": {"username": "yard", "password": "hunter2"}}}))
        await image(await opened(stack, f"{HOST}:{PLAIN}", tls="off"), "iris", "1", LAYER)
        assert asked and any("http://tokens.example/token" in line for line in proxy.seen)
        asked.clear()
        config.write_text(json.dumps({"auths": {f"{HOST}:{PLAIN}": {"registrytoken": "kept"}}}))
        store = await opened(stack, f"{HOST}:{PLAIN}", tls="off")
        await image(store, "iris", "1", LAYER)
        assert asked == []
        config.write_text(json.dumps({"auths": {f"{HOST}:{PLAIN}": {"registrytoken": "bad"}}}))
        with pytest.raises(Denied, match="other credentials"):
            await (await opened(stack, f"{HOST}:{PLAIN}", tls="off")).check()
