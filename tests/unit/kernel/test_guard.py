"""Who may ask: hosts, origins, tokens, and whose word on the workspace is believed."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.kernel.garden import SERVICE_TOKEN, Yard, yard

PATHS = ["/v1/plants", "/v1/plants/rose", "/v1/events", "/v1/dead", "/v1/openapi.json", "/v1/docs", "/metrics",
         "/nowhere"]
SERVICE = {"x-modelyard-service-token": SERVICE_TOKEN}


async def status(here: Yard, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
    code, _, body = await here.call(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    return code, body["code"] if isinstance(body, dict) and "code" in body else ""


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8700", "169.254.169.254", "user@localhost",
                                  "localhost:port", "", "[::2]", "localhost, evil.example"])
async def test_other_hosts_are_refused(tmp_path: Path, host: str) -> None:
    async with yard(tmp_path) as here:
        for path in [*PATHS, "/livez", "/readyz"]:
            assert await status(here, path, host=host) == (421, "misdirected")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8700", "127.0.0.1:1", "[::1]:8700", "[::1]", "localhost."])
async def test_own_hosts_are_answered(tmp_path: Path, host: str) -> None:
    async with yard(tmp_path) as here:
        assert (await status(here, "/livez", host=host))[0] == 200


async def test_configured_hosts(tmp_path: Path) -> None:
    async with yard(tmp_path, hosts=["yard.example"]) as here:
        assert (await status(here, "/livez", host="yard.example:443"))[0] == 200
        assert (await status(here, "/livez"))[0] == 421
    async with yard(tmp_path, hosts=["*"]) as here:
        assert (await status(here, "/livez", host="any.example"))[0] == 200


async def test_origins(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        port = here.url.rpartition(":")[2]
        for origin in ("https://evil.example", "null", f"http://evil.example:{port}", "http://localhost:1", "file://",
                       f"http://localhost:{port}@evil.example", "chrome-extension://abc", ""):
            for method in ("GET", "POST", "DELETE"):
                code = await status(here, "/v1/plants/rose", method, origin=origin)
                assert code == (403, "foreign-origin"), origin
        for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}", f"http://[::1]:{port}"):
            assert (await status(here, "/v1/plants", origin=origin))[0] == 200
        assert (await status(here, "/v1/plants", host="localhost", origin="http://localhost"))[0] == 200


async def test_one_bearer_token_on_everything(tmp_path: Path) -> None:
    async with yard(tmp_path, token="sesame") as here:
        assert [(await status(here, path))[0] for path in ("/livez", "/readyz")] == [200, 200]
        for path in PATHS:
            assert await status(here, path) == (401, "unauthenticated")
            for wrong in ("Bearer sesam", "Bearer sesamee", "Basic sesame", "sesame", "Bearer", "Bearer sésame"):
                assert await status(here, path, authorization=wrong) == (401, "unauthenticated")
        _, headers, _ = await here.call("GET", "/v1/plants")
        assert headers["www-authenticate"].startswith("Bearer")
        for right in ("Bearer sesame", "bearer sesame", "Bearer  sesame"):
            assert (await status(here, "/v1/plants", authorization=right))[0] == 200
        assert (await status(here, "/v1/plants", **SERVICE))[0] == 200


async def test_internal_routes_need_the_service_token(tmp_path: Path) -> None:
    async with yard(tmp_path, token="sesame") as here:
        path = "/internal/v1/plants/rose"
        assert await status(here, path) == (403, "denied")
        assert await status(here, path, authorization="Bearer sesame") == (403, "denied")
        assert await status(here, path, x_modelyard_service_token="wrong") == (403, "bad-service-token")
        assert await status(here, "/v1/plants", x_modelyard_service_token="wrong") == (403, "bad-service-token")
        assert (await here.call("GET", path, headers=SERVICE))[0] == 200
        assert await status(here, "/internal/nothing") == (403, "denied")


async def test_the_workspace_is_believed_from_services_only(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        claim = {"x-modelyard-workspace": "other"}
        await here.call("POST", "/v1/plants", json={"name": "rose"}, headers=claim)
        await here.call("POST", "/v1/plants", json={"name": "lily"}, headers=claim | SERVICE)
        mine = (await here.call("GET", "/v1/plants"))[2]["items"]
        theirs = (await here.call("GET", "/v1/plants", headers=claim | SERVICE))[2]["items"]
        assert [(p["id"], p["workspace"]) for p in mine] == [("rose", "default")]
        assert [(p["id"], p["workspace"]) for p in theirs] == [("lily", "other")]
        assert (await here.call("GET", "/v1/plants/rose", headers=claim | SERVICE))[0] == 404
