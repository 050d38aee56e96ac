"""Which calls go through a proxy, and through which."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from yarl import URL

from modelyard.adapters import urls
from modelyard.core.errors import BuildFailed, Invalid
from modelyard.image_builder.fetch import fetch
from modelyard.image_builder.uv import environment
from modelyard.kernel.proxies import through

NAMES = ("https_proxy", "http_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def proxy(url: str) -> str:
    return str(through(URL(url)) or "")


def test_each_scheme_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy("https://r.example/v2/") == ""
    monkeypatch.setenv("ALL_PROXY", "http://any:3")
    assert proxy("https://r.example") == proxy("http://r.example") == "http://any:3"
    monkeypatch.setenv("HTTPS_PROXY", "http://somebody:p%40ss@secure:1")
    monkeypatch.setenv("HTTP_PROXY", "plain:2")
    assert proxy("https://r.example") == "http://somebody:p%40ss@secure:1"
    assert proxy("http://r.example") == "http://plain:2"
    monkeypatch.setenv("https_proxy", "http://lower:4")
    assert proxy("https://r.example") == "http://lower:4"


@pytest.mark.parametrize("url", ["http://127.0.0.1:5000", "http://localhost:5000", "https://[::1]:5000/v2/"])
def test_loopback_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://any:3")
    assert proxy(url) == ""
    assert through(URL(url), "http://mine:9") == URL("http://mine:9")
    assert through(URL("https://r.example"), "off") is None


@pytest.mark.parametrize(("without", "url", "goes"), [
    ("*", "https://r.example", False), ("", "https://r.example", True),
    ("else.example, r.example", "https://r.example:5000", False), ("r.example", "https://R.EXAMPLE", False),
    ("example", "https://r.example", False), (".example", "https://r.example", False),
    ("*.example", "https://r.example", False), ("xample", "https://r.example", True),
    ("r.example:5000", "https://r.example:5000", False), ("r.example:5000", "https://r.example", True),
    ("10.0.0.0/8", "https://10.1.2.3", False), ("10.0.0.0/8", "https://11.1.2.3", True),
    ("10.1.2.3", "https://10.1.2.3:5000", False), ("10.1.2.3:5000", "https://10.1.2.3", True),
    ("[fd00::1]:5000", "https://[fd00::1]:5000", False), ("fd00::/8", "https://[fd00::1]:5000", False),
    ("10.0.0.0/8", "https://r.example", True), ("r.example", "https://10.1.2.3", True),
])
def test_what_no_proxy_holds(monkeypatch: pytest.MonkeyPatch, without: str, url: str, goes: bool) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://any:3")
    monkeypatch.setenv("NO_PROXY", without)
    assert bool(through(URL(url))) is goes


@pytest.mark.parametrize("text", ["socks5://me:hunter2@p:1", "http://", "http://me:hunter2@[p"])
def test_what_is_no_proxy_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", text)
    with pytest.raises(Invalid, match="HTTPS_PROXY") as found:
        through(URL("https://r.example"))
    assert "hunter2" not in found.value.message


@pytest.mark.parametrize("wanted", ["ftp://p:1", "http://me:hunter2@p:1"])
async def test_a_registrys_url_names_a_proxy_without_credentials(wanted: str) -> None:
    with pytest.raises(Invalid, match="proxy") as found:
        await urls.open_images(f"oci://r.example/x?proxy={wanted}")
    assert "hunter2" not in found.value.message
    for good in ("off", "http://p:1"):
        await (await urls.open_images(f"oci://r.example/x?proxy={good}")).close()


def test_uv_gets_them_and_goes_to_loopback_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NO_PROXY" not in environment()
    monkeypatch.setenv("HTTPS_PROXY", "http://any:3")
    monkeypatch.setenv("no_proxy", "r.example")
    kept = environment()
    assert kept["HTTPS_PROXY"] == "http://any:3"
    assert kept["NO_PROXY"] == kept["no_proxy"] == "r.example,localhost,127.0.0.1,::1"


class Seen(BaseHTTPRequestHandler):
    """A proxy, and a server of files: it keeps what it was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(302 if self.path.endswith("/moved") else 200)
        self.send_header("Location", "http://mirror.example/tiny")
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"tiny")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Where it is, and what it was asked for."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Seen,), {"asked": asked})) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()
        thread.join()


def test_a_file_of_an_index_comes_through_it(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    """As uv goes: a redirect as well, and past it to this machine and to what NO_PROXY names."""
    url, asked = server
    sha256 = hashlib.sha256(b"tiny").hexdigest()
    monkeypatch.setenv("HTTP_PROXY", url)
    fetch("http://index.example/moved", tmp_path / "a", sha256, {})
    assert asked == ["http://index.example/moved", "http://mirror.example/tiny"]
    fetch(f"{url}/near", tmp_path / "b", sha256, {})
    assert asked[2:] == ["/near"]
    monkeypatch.setenv("HTTP_PROXY", "ftp://p:hunter2@p")
    with pytest.raises(BuildFailed, match="a proxy is http") as found:
        fetch("http://index.example/tiny", tmp_path / "c", sha256, {})
    assert "hunter2" not in found.value.message
