"""OpenAPI: true to the routes, the same from every server, and a page without outside parts."""

import re
from pathlib import Path
from typing import Any

from tests.unit.kernel.garden import yard


def refs(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {v for k, v in value.items() if k == "$ref"} | {r for v in value.values() for r in refs(v)}
    return {r for v in value for r in refs(v)} if isinstance(value, list) else set()


async def test_it_describes_every_public_route(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        document = (await here.call("GET", "/v1/openapi.json"))[2]
        assert document["openapi"] == "3.1.0"
        assert {"/v1/plants", "/v1/plants/{ref}", "/v1/trees/{ref}/slow", "/v1/events", "/v1/dead/{id}/replay",
                "/livez", "/readyz", "/metrics", "/v1/openapi.json", "/v1/docs"} <= document["paths"].keys()
        assert not [p for p in document["paths"] if "internal" in p]
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                declared = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
                assert declared == set(re.findall(r"{(\w+)}", path))
                where = path.replace("{ref}", "rose").replace("{id}", "x")
                if not path.endswith(("/slow", "/boom")):
                    query = {"follow": "false"} if path == "/v1/events" else {}
                    assert (await here.call(method.upper(), where, params=query))[0] not in (405, 500), path
        ids = [o["operationId"] for m in document["paths"].values() for o in m.values()]
        assert len(ids) == len(set(ids))
        for ref in refs(document):
            assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"]
        plant = document["components"]["schemas"]["Plant"]["properties"]
        assert {"id", "generation", "phase"} <= plant.keys() and not {"revision", "made_by", "secret"} & plant.keys()
        create = document["paths"]["/v1/plants"]["post"]
        assert create["requestBody"]["content"].keys() == {"application/json", "application/yaml"}
        assert "201" in create["responses"] and "application/problem+json" in create["responses"]["default"]["content"]


async def test_every_server_gives_the_same(tmp_path: Path) -> None:
    documents = []
    for names in (["garden", "orchard"], ["garden"], ["orchard"]):
        async with yard(tmp_path, names) as here:
            documents.append((await here.call("GET", "/v1/openapi.json"))[2])
    assert documents[0] == documents[1] == documents[2]


async def test_the_page_is_complete_in_itself(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        status, headers, text = await here.call("GET", "/v1/docs")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "/v1/plants/{ref}" in text and "Show a plant" in text
        assert "<script" not in text and not re.search(r"(src|href)=['\"]?(https?:)?//", text)
        assert "default-src 'none'" in headers["content-security-policy"]
