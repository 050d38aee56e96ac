"""Who gets our credentials and who does not: tokens, helpers, redirects; and registries that send us away, or round."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from infra.stack.registry import Registry
from modelyard.adapters import images_registry_errors_http as errors
from modelyard.adapters import images_registry_login as logins
from modelyard.adapters import images_registry_upload as upload
from modelyard.adapters.images_registry import RegistryImages
from modelyard.adapters.images_registry_errors_http import retry_after
from modelyard.adapters.images_registry_http import HOPS, TRIES, Door
from modelyard.core.errors import Denied, Invalid, ModelyardError, NotFound, Unavailable
from tests.backends import need
from tests.contract.test_images import chunks, digest, image, read
from tests.gate import Gate

pytestmark = pytest.mark.slow
MB = 1 << 20
USERS = "yard:$2b$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n"  # yard, hunter2
BASIC = base64.b64encode(b"yard:hunter2").decode()
LAYER = os.urandom(3 * MB)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("registry")
    with Registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "config.json"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repeated is repeated sooner."""
    monkeypatch.setattr(errors, "FIRST_S", 0.02)


@pytest.fixture
async def gate(registry: Registry, config: Path) -> AsyncIterator[Gate]:
    async with Gate(registry.port).open() as found:
        yield found


@pytest.fixture
async def images(gate: Gate) -> AsyncIterator[RegistryImages]:
    store = await RegistryImages.open(f"{gate.url}/a{os.urandom(4).hex()}", timeout_s=2.0)
    yield store
    await store.close()


def log_in(config: Path, gate: Gate, **entry: str) -> None:
    config.write_text(json.dumps({"auths": {f"127.0.0.1:{gate.port}": entry}}))


@asynccontextmanager
async def stranger(answer: Any) -> AsyncIterator[tuple[str, list[web.Request]]]:
    """Another host: its URL, and what it was asked."""
    asked: list[web.Request] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(request)
        await request.read()
        return answer(request)  # type: ignore[no-any-return]

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


class Tokens:
    """A token server at ``/token`` of the gate: each token is another, and good for what was asked until ``expire``."""

    def __init__(self, gate: Gate, **answer: Any) -> None:
        self.gate, self.answer = gate, answer
        self.good: dict[str, set[str]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.trouble: list[web.Response] = []
        gate.wants = self.look

    def of(self, repo: str) -> int:
        """Tokens for a repository; the look at what others have wants one of its own."""
        return sum(f"/{repo}:" in query.get("scope", "") for _, _, query in self.asked)

    def expire(self) -> None:
        self.good.clear()

    def look(self, request: web.Request) -> web.Response | None:
        if request.path == "/token":
            return self.give(request)
        repo = request.path.removeprefix("/v2/").partition("/blobs/")[0].partition("/manifests/")[0].partition(
            "/tags/")[0]
        needs = {f"{repo}:pull"} | ({f"{repo}:push"} if request.method not in ("GET", "HEAD") else set())
        held = self.good.get(request.headers.get("Authorization", "").removeprefix("Bearer "), set())
        if needs <= held:
            return None
        actions = ",".join(sorted(need.rpartition(":")[2] for need in needs))
        return web.Response(status=401, headers={"WWW-Authenticate": (
            f'Bearer realm="http://127.0.0.1:{self.gate.port}/token",service="yard",scope="repository:{repo}:{actions}"'
        )})

    def give(self, request: web.Request) -> web.Response:
        self.asked.append((request.method, request.headers.get("Authorization", ""), dict(request.query)))
        if self.trouble:
            return self.trouble.pop()
        word, granted = os.urandom(12).hex(), set()
        for scope in request.query.getall("scope", []):
            _, repo, actions = scope.split(":")
            granted |= {f"{repo}:{action}" for action in actions.split(",")}
        self.good[word] = granted
        return web.json_response({"token": word, "expires_in": 300, **self.answer})


async def test_a_token_that_lapses_in_the_middle_of_an_upload(
    images: RegistryImages, gate: Gate, config: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new one is got; what was sent is not sent again, nor the upload begun anew."""
    log_in(config, gate, username="yard", password="hunter2")
    monkeypatch.setattr(upload, "STRETCH", 4 * MB)
    tokens, data, times = Tokens(gate), os.urandom(18 * MB), []

    class Source:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            times.append(1)
            for n in range(0, len(data), MB):
                if n == 10 * MB and len(times) == 1:
                    tokens.expire()
                yield data[n:n + MB]

    assert await images.put_blob("iris", digest(data), Source()) is True
    assert await read(images, "iris", digest(data)) == data
    assert gate.count("^POST .*uploads/") == 2 and gate.count("^PATCH") == 6  # one refused each
    assert {auth for _, auth, _ in tokens.asked} == {f"Basic {BASIC}"} and tokens.of("iris") == 3


async def test_one_token_for_all_calls_of_one_moment(images: RegistryImages, gate: Gate, config: Path) -> None:
    log_in(config, gate, auth=BASIC)
    tokens = Tokens(gate)
    await image(images, "iris", "1", *(b"layer %d" % n for n in range(8)))
    assert tokens.of("iris") == 2  # to look, and to put: the second is good for both
    tokens.expire()
    await asyncio.gather(*(read(images, "iris", digest(b"layer %d" % n)) for n in range(8)))
    assert tokens.of("iris") == 3
    tokens.expire()
    mixed = [images.put_blob("iris", digest(b"new %d" % n), chunks(b"new %d" % n)) for n in range(8)]
    await asyncio.gather(*mixed, *(read(images, "iris", digest(b"layer %d" % n)) for n in range(8)))
    assert tokens.of("iris") == 4


@pytest.mark.parametrize("lasts", [11, 1])
async def test_a_short_life_is_believed(images: RegistryImages, gate: Gate, lasts: int) -> None:
    """A token that says how long it lives is not used beyond; where that is no time at all, it is used once."""
    tokens = Tokens(gate, expires_in=lasts)
    assert await images.get_manifest("iris", "1") is None
    await asyncio.sleep(1.05)  # the shortest that one is kept
    assert await images.get_manifest("iris", "1") is None
    assert len(tokens.asked) == 2 and {auth for _, auth, _ in tokens.asked} == {""}


async def test_an_identity_token(images: RegistryImages, gate: Gate, config: Path) -> None:
    """It goes to the token server in a form, as no password; and not along with a redirect."""
    log_in(config, gate, identitytoken="identity-4711")
    word = {"access_token": "word", "expires_in": 300}
    async with stranger(lambda request: web.json_response(word)) as (url, asked):
        challenge = {"WWW-Authenticate": f'Bearer realm={url}/token,service="yard"'}  # not every realm is quoted
        gate.wants = lambda request: None if request.headers.get("Authorization") == "Bearer word" else web.Response(
            status=401, headers=challenge)
        assert await images.get_manifest("iris", "1") is None
        form = await asked[0].post()
        assert asked[0].method == "POST" and "Authorization" not in asked[0].headers
        assert (form["grant_type"], form["refresh_token"]) == ("refresh_token", "identity-4711")
        async with stranger(lambda request: web.Response(status=307, headers={"Location": f"{url}/else"})) as (near, _):
            challenge["WWW-Authenticate"] = f'Bearer realm="{near}/token"'
            gate.wants = lambda request: web.Response(status=401, headers=challenge)
            with pytest.raises(Invalid, match="token server"):
                await images.get_manifest("iris", "2")
        assert len(asked) == 1


async def test_two_challenges(images: RegistryImages, gate: Gate, config: Path) -> None:
    """A registry may offer several; the token is taken."""
    log_in(config, gate, auth=BASIC)
    tokens = Tokens(gate)
    plain = tokens.look

    def both(request: web.Request) -> web.Response | None:
        if (answer := plain(request)) is not None and answer.status == 401:
            answer.headers.add("WWW-Authenticate", 'Basic realm="yard"')
        return answer

    gate.wants = both
    assert await images.get_manifest("iris", "1") is None
    assert len(tokens.asked) == 1


async def test_a_helper_opens_a_registry_that_wants_a_password(config: Path, tmp_path: Path) -> None:
    need("registry")
    with Registry(tmp_path / "server", htpasswd=USERS) as locked:
        helper = tmp_path / "docker-credential-own"
        helper.write_text('#!/bin/sh\nread host\n[ "$1" = get ] && [ "$host" = "127.0.0.1:' + str(locked.port) + '" ] '
                          '&& echo \'{"Username": "yard", "Secret": "hunter2"}\'\n')
        helper.chmod(0o755)
        for table in ({"credHelpers": {f"127.0.0.1:{locked.port}": "own"}}, {"credsStore": "own"}):
            config.write_text(json.dumps(table))
            store = await RegistryImages.open(f"{locked.url}/yard")
            await store.check()
            await image(store, "iris", "1", b"layer")
            await store.close()
        config.write_text("{}")
        store = await RegistryImages.open(f"{locked.url}/yard")
        with pytest.raises(Denied, match="docker login 127"):
            await store.check()
        await store.close()


async def test_a_helper_that_does_not_answer(images: RegistryImages, gate: Gate, config: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "HELPER_S", 0.3)
    helper = config.with_name("docker-credential-slow")
    helper.write_text("#!/bin/sh\nexec sleep 600\n")
    helper.chmod(0o755)
    config.write_text(json.dumps({"credsStore": "slow"}))
    Tokens(gate)
    with pytest.raises(Invalid, match=r"docker-credential-slow did not answer within"):
        await images.get_manifest("iris", "1")


async def test_credentials_stay_at_home_when_a_blob_lies_elsewhere(
        images: RegistryImages, gate: Gate, config: Path) -> None:
    log_in(config, gate, auth=BASIC)
    await image(images, "iris", "1", LAYER)
    tokens = Tokens(gate)

    def blob(request: web.Request) -> web.Response:
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        return web.Response(status=206 if start else 200, body=LAYER[start:])

    async with stranger(blob) as (url, asked):
        gate.plan("^GET .*blobs/", status=307, headers={"Location": f"{url}/blob?signature=x"}, times=2)
        assert await read(images, "iris", digest(LAYER)) == LAYER
        assert await read(images, "iris", digest(LAYER), MB) == LAYER[MB:]
    assert len(asked) == 2 and len(tokens.asked) == 1
    for request in asked:
        assert request.path_qs == "/blob?signature=x" and not {"Authorization", "Cookie"} & request.headers.keys()


@pytest.mark.parametrize("scheme", ["Basic realm=x", 'Bearer realm="{}/token",scope="repository:iris:pull"'])
async def test_who_we_are_sent_on_to_gets_nothing_by_asking(
        images: RegistryImages, gate: Gate, config: Path, scheme: str) -> None:
    """Its challenge is not the registry's. The registry is asked again: an address it signed may have lapsed."""
    log_in(config, gate, auth=BASIC)
    await image(images, "iris", "1", LAYER)

    def challenge(request: web.Request) -> web.Response:
        return web.Response(status=401, headers={"WWW-Authenticate": scheme.format(f"http://{request.host}")})

    async with stranger(challenge) as (url, asked):
        gate.plan("^GET .*blobs/", status=302, headers={"Location": f"{url}/blob"}, times=2)
        assert await read(images, "iris", digest(LAYER)) == LAYER
        gate.plan("^GET .*blobs/", status=302, headers={"Location": f"{url}/blob"}, times=100)
        with pytest.raises(Unavailable, match=r"sends us on to 127\.0\.0\.1, which refuses us with 401"):
            await read(images, "iris", digest(LAYER))
    assert len(asked) == 2 + TRIES and {request.path for request in asked} == {"/blob"}
    assert not any("Authorization" in request.headers for request in asked)


async def test_redirects_in_a_circle_end_at_once(images: RegistryImages, gate: Gate) -> None:
    gate.plan("/blobs/", status=307, headers={"Location": "/v2/x/blobs/again"}, times=1000)
    with pytest.raises(Invalid, match=f"in circles: more than {HOPS} redirects"):
        await read(images, "iris", digest(LAYER))
    assert len(gate.seen) == HOPS + 1


@pytest.mark.parametrize(("to", "error", "told"), [
    ("http://else.example/blob", Denied, "to else.example without TLS"), ("ftp://x/y", Denied, "without TLS"),
    ("https://[::1", Invalid, "no address"), ("https://else.example/blob", None, ""), ("/other", None, "")])
async def test_where_a_redirect_may_lead(to: str, error: type[ModelyardError] | None, told: str) -> None:
    door = Door("r.example", True, 1.0)
    asked = URL("https://r.example/v2/x/blobs/1")
    if error is None:
        assert str(door._moved(asked, to, 1)) == str(asked.join(URL(to)))
        return
    with pytest.raises(error, match=told):
        door._moved(asked, to, 1)


@pytest.mark.parametrize(("given", "found"), [
    ("http://r.example/v2/x/uploads/1?s=a%2Bb", "https://r.example:5000/v2/x/uploads/1?s=a%2Bb"),
    ("http://r.example:80/v2/x", "https://r.example:5000/v2/x"), ("/v2/x", "https://r.example:5000/v2/x"),
    ("https://r.example:5000/v2/x", "https://r.example:5000/v2/x"), ("https://o.example/v2/x", "https://o.example/v2/x"),
])
def test_an_upload_goes_on_with_tls(given: str, found: str) -> None:
    """A registry behind somebody else's TLS names itself without."""
    door = Door("r.example:5000", True, 1.0)
    assert str(door.location({"Location": given}, URL("https://r.example:5000/v2/x/uploads/"))) == found


async def test_no_secret_is_in_an_error_or_a_log(images: RegistryImages, gate: Gate, config: Path,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    """Even where the registry repeats what it was sent."""
    log_in(config, gate, username="yard", password="hunter2")
    caplog.set_level(logging.DEBUG)
    tokens = Tokens(gate)
    plain = tokens.look

    def echo(request: web.Request) -> web.Response | None:
        if (answer := plain(request)) is not None:
            return answer
        said = f"no: {request.headers['Authorization']}, hunter2 {BASIC}"
        return web.json_response({"errors": [{"code": "WHY", "message": said}]}, status=int(os.environ["STATUS"]))

    gate.wants = echo
    for status in ("403", "404", "418", "500"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ModelyardError) as found:
            patch.setenv("STATUS", status)
            await images._door.ask("GET", "/v2/iris/manifests/1", about="x", repo="iris", tries=1)
        secrets = ("hunter2", BASIC, *tokens.good)
        assert "WHY: no: Bearer ***" in found.value.message
        for text in (found.value.message, str(found.value.detail), caplog.text):
            assert not [secret for secret in secrets if secret in text], text


async def test_a_token_server_in_trouble(images: RegistryImages, gate: Gate) -> None:
    tokens = Tokens(gate)
    tokens.trouble = [web.Response(status=503), web.Response(status=500), web.Response(status=200, body=b"<html>")]
    assert await images.put_blob("iris", digest(b"x"), chunks(b"x")) is True
    tokens.expire()
    tokens.trouble = [web.Response(status=403, body=b"{}")]
    with pytest.raises(Denied, match="the token server 127"):
        await read(images, "iris", digest(b"x"))
    assert await read(images, "iris", digest(b"x")) == b"x"


async def test_a_mount_that_is_not_allowed_becomes_an_upload(images: RegistryImages, gate: Gate) -> None:
    await images.put_blob("iris", digest(LAYER), chunks(LAYER))
    gate.plan("mount=", status=403)
    assert await images.put_blob("rose", digest(LAYER), chunks(LAYER)) is True


@pytest.mark.parametrize("header", ["3600", "date"])
async def test_a_registry_that_wants_an_hour_is_an_error_at_once(
        images: RegistryImages, gate: Gate, header: str) -> None:
    when = formatdate(time.time() + 3600, usegmt=True) if header == "date" else header
    gate.plan("", status=429, headers={"Retry-After": when}, times=100)
    for call in (images.get_manifest("iris", "1"), read(images, "iris", digest(b"x"))):
        gate.seen.clear()
        with pytest.raises(Unavailable, match=r"left alone for 3[56]\d\d s") as found:
            await call
        assert len(gate.seen) == 1 and 3500 < found.value.detail["retry_after"] <= 3600


async def test_a_blob_is_waited_for_as_long_as_the_registry_wants(images: RegistryImages, gate: Gate) -> None:
    await images.put_blob("iris", digest(b"x"), chunks(b"x"))
    gate.plan("^GET .*blobs/", status=503, headers={"Retry-After": "1"})
    began = time.monotonic()
    assert await read(images, "iris", digest(b"x")) == b"x"
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize(("told", "seconds"), [
    ("", None), ("soon", None), ("0", 0.0), ("7", 7.0), ("-1", None), ("1" * 40, 111111111.0),
    ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)])
def test_what_retry_after_says(told: str, seconds: float | None) -> None:
    assert retry_after({"Retry-After": told}) == seconds


async def test_answers_that_break_off(images: RegistryImages, gate: Gate) -> None:
    """Whatever length was promised: what is not there is not taken for whole."""
    await images.put_blob("iris", digest(LAYER), chunks(LAYER))
    gate.plan("^GET .*blobs/", got=0, times=1000)
    with pytest.raises(Unavailable, match="breaks off in the middle"):
        await read(images, "iris", digest(LAYER))
    assert gate.count("^GET .*blobs/") == TRIES
    gate.planned.clear()
    gate.plan("^GET .*blobs/", status=200, body=LAYER[:1000])
    with pytest.raises(Invalid, match="damaged"):
        await read(images, "iris", digest(LAYER))
    gate.plan("^GET .*blobs/", status=404)
    with pytest.raises(NotFound):
        await read(images, "iris", digest(LAYER))
