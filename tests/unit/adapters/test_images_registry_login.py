"""Credentials as Docker keeps them, good and bad; and what a registry's URL may say. No registry is asked."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters import urls
from modelyard.adapters.images_registry_login import Login, login
from modelyard.core.errors import Invalid
from modelyard.kernel.proxies import loopback

AUTH = base64.b64encode(b"somebody:pass:word").decode()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def helper(folder: Path, name: str, script: str) -> None:
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


async def test_nobody_logged_in(config: Path) -> None:
    assert await login("r.example") is None
    config.write_text("[]")
    assert await login("r.example") is None


async def test_the_config_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": {"r.example": {"auth": AUTH}}}))
    assert await login("r.example") == Login("somebody", "pass:word")


@pytest.mark.parametrize(("host", "key"), [
    ("r.example", "r.example"), ("r.example:5000", "r.example:5000"), ("r.example", "https://r.example"),
    ("r.example", "https://r.example/v2/"), ("127.0.0.1:5000", "http://127.0.0.1:5000"),
    ("docker.io", "https://index.docker.io/v1/"),
])
async def test_hosts_as_they_are_written(config: Path, host: str, key: str) -> None:
    config.write_text(json.dumps({"auths": {key: {"auth": AUTH}, "else.example": {"auth": "eDp5"}}}))
    assert await login(host) == Login("somebody", "pass:word")


@pytest.mark.parametrize(("entry", "found"), [
    ({"username": "u", "password": "p"}, Login("u", "p")),
    ({"identitytoken": "t", "auth": AUTH}, Login(identity="t")),
    ({"registrytoken": "r", "identitytoken": "t", "auth": AUTH}, Login(token="r")),
    ({}, None), ([], None),
])
async def test_what_an_entry_may_hold(config: Path, entry: Any, found: Login | None) -> None:
    config.write_text(json.dumps({"auths": {"r.example": entry}}))
    assert await login("r.example") == found


@pytest.mark.parametrize("text", ["{", "\x00", '{"auths": {"r.example": {"auth": "!"}}}',
                                  '{"auths": {"r.example": {"auth": "bm9jb2xvbg=="}}}'])
async def test_a_config_that_is_no_good_is_named(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(Invalid) as told:
        await login("r.example")
    assert str(config) in told.value.message


async def test_helpers(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    helper(tmp_path, "own", 'read host; echo "{\\"Username\\": \\"$host\\", \\"Secret\\": \\"own\\"}"')
    helper(tmp_path, "all", 'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"all\\"}"')
    helper(tmp_path, "none", 'echo "credentials not found in native keychain"; exit 1')
    helper(tmp_path, "odd", "echo hello")
    auths = {"r.example": {"auth": AUTH}}
    config.write_text(json.dumps({"credHelpers": {"r.example": "own"}, "credsStore": "all", "auths": auths}))
    assert await login("r.example") == Login("r.example", "own")
    assert await login("else.example") == Login(identity="all")
    config.write_text(json.dumps({"credsStore": "none", "auths": auths}))
    assert await login("r.example") == Login("somebody", "pass:word")
    for name in ("odd", "missing", "../../bin/sh"):
        config.write_text(json.dumps({"credsStore": name}))
        with pytest.raises(Invalid, match=r"docker-credential|cannot be one"):
            await login("r.example")


@pytest.mark.parametrize(("host", "here"), [
    ("127.0.0.1", True), ("127.0.0.1:5000", True), ("localhost:5000", True), ("localhost", True), ("[::1]:5000", True),
    ("127.8.8.8:1", True), ("r.example", False), ("10.0.0.1:5000", False), ("localhost.example:5000", False),
    ("[fe80::1]:5000", False), ("registry:5000", False),
])
def test_where_no_tls_is_expected(host: str, here: bool) -> None:
    assert loopback(host) is here


@pytest.mark.parametrize(("url", "told"), [
    ("oci://somebody:hunter2@r.example/x", "docker login r.example"), ("oci://r.example/X", "repository name"),
    ("oci://r.example/x?tls=maybe", "tls is on or off"), ("oci:///x", "names no host"),
    ("oci://r.example/x?nothing=1", "unknown option"),
])
async def test_urls_that_are_none_of_a_registry(url: str, told: str) -> None:
    with pytest.raises(Invalid, match=told) as found:
        await urls.open_images(url)
    assert "hunter2" not in found.value.message
