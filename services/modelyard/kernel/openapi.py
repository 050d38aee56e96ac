"""The routes of all services as OpenAPI 3.1 (``/v1/openapi.json``) and as a page (``/v1/docs``).

Built from the declared services alone, so every server gives the same document, whichever services it runs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, cast

import orjson
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..core.documents import INTERNAL, Document
from .call import Call, reply
from .idempotency import HEADER
from .service import Context, Service
from .web import Route

Group = tuple[str, Sequence[Route]]
REF = "#/components/schemas/{model}"
PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["type", "title", "status", "code", "detail", "request_id"],
    "properties": {
        "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"},
        "code": {"type": "string", "description": "The stable word for programs."},
        "detail": {"type": "string", "description": "What is wrong and what to do."},
        "errors": {"type": "array", "description": "Every problem of the request at once.", "items": {
            "type": "object", "properties": {"field": {"type": "string"}, "message": {"type": "string"}}}},
        "help": {"type": "string"}, "request_id": {"type": "string"},
        "blockers": {"type": "array", "items": {"type": "object", "properties": {
            "kind": {"type": "string"}, "id": {"type": "string"}, "phase": {"type": "string"}}}},
    },
}


class _NoContext:
    """Stands for a Context while routes are only listed."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"Service.routes may use the context only inside handlers, not to list routes (.{name})")


def declared(services: Sequence[Service], kernel: Sequence[Route]) -> list[Group]:
    """(tag, its public routes) for every service, and for the kernel's own routes."""
    nothing = cast(Context, _NoContext())
    groups: list[Group] = [(s.name, [r for r in s.routes(nothing) if not r.path.startswith("/internal/")])
                           for s in services]
    return [*groups, ("events and server", [r for r in kernel if not r.path.startswith("/internal/")])]


def build(groups: Sequence[Group]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    schemas, refs = _schemas([r for _, routes in groups for r in routes])
    paths: dict[str, dict[str, Any]] = {}
    for tag, routes in groups:
        for route in routes:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, tag, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Modelyard", "version": _version(),
                 "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
                 "description": "Register, build, deploy, score, capture, watch. Every server answers every route."},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag, _ in groups],
        "paths": paths,
        "components": {"schemas": {**schemas, "Problem": PROBLEM_SCHEMA},
                       "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _version() -> str:
    try:
        return version("modelyard")
    except PackageNotFoundError:
        return "0"


Refs = Mapping[tuple[type[BaseModel], str], dict[str, Any]]


def _schemas(routes: Sequence[Route]) -> tuple[dict[str, Any], Refs]:
    wanted = dict.fromkeys(
        pair for r in routes for pair in ((r.body, "validation"), (r.answer, "serialization")) if pair[0] is not None)
    refs, found = models_json_schema(cast(Any, list(wanted)), ref_template=REF)
    schemas = found.get("$defs", {})
    for (model, _), ref in refs.items():
        if issubclass(model, Document):
            _public(schemas[str(ref["$ref"]).rpartition("/")[2]], INTERNAL | model.hidden)
    return schemas, cast(Refs, refs)


def _public(schema: dict[str, Any], hidden: frozenset[str]) -> None:
    schema["properties"] = {k: v for k, v in schema.get("properties", {}).items() if k not in hidden}
    schema["required"] = [k for k in schema.get("required", []) if k not in hidden]
    schema.pop("description", None)


def _operation(route: Route, tag: str, refs: Refs) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9]+", "_", f"{route.method} {route.path.removeprefix('/v1')}".lower()).strip("_")
    operation: dict[str, Any] = {"operationId": name, "summary": route.summary, "tags": [tag],
                                 "parameters": _parameters(route), "responses": _responses(route, refs)}
    if (content := _content(route, refs)) is not None:
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    text = {"type": "string"}
    found: list[dict[str, Any]] = [{"name": name, "in": "path", "required": True, "schema": text}
                                   for name in re.findall(r"{(\w+)", route.path)]
    found += [{"name": name, "in": "query", "description": told, "schema": text} for name, told in route.query.items()]
    if route.method == "POST":
        found.append({"name": HEADER, "in": "header", "schema": text,
                      "description": "The same key within 24 hours gives the first answer again."})
    if route.method in ("PUT", "PATCH", "DELETE"):
        found.append({"name": "If-Match", "in": "header", "schema": text,
                      "description": "The ETag that was read: a newer generation is answered with 412."})
    return found


def _content(route: Route, refs: Refs) -> dict[str, Any] | None:
    if route.raw:
        return {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    if route.body is None:
        return None
    if route.method == "PATCH":
        return {"application/merge-patch+json": {"schema": {"type": "object"}},
                "application/json": {"schema": {"type": "object"}}}
    schema = {"schema": refs[route.body, "validation"]}
    return {"application/json": schema, "application/yaml": schema}


def _responses(route: Route, refs: Refs) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "Done" if route.status < 202 else "Accepted"}
    if route.answer is not None:
        good["content"] = {"application/json": {"schema": refs[route.answer, "serialization"]}}
    problem = {"schema": {"$ref": REF.format(model="Problem")}}
    return {str(route.status): good, "default": {"description": "A problem",
                                                 "content": {"application/problem+json": problem}}}


STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222}
h2 {margin-top: 2.5rem; border-bottom: 1px solid #ddd}
details {margin: .4rem 0; border: 1px solid #e3e3e3; border-radius: 6px; padding: .4rem .8rem}
summary {cursor: pointer}
code, pre {font: 13px ui-monospace, monospace}
b {display: inline-block; width: 4.5rem; color: #05527c}
pre {background: #f6f6f6; padding: .6rem; overflow: auto}
td {padding: .1rem .8rem .1rem 0; vertical-align: top}
"""


def page(document: Mapping[str, Any]) -> str:
    """The document as one HTML page, complete in itself."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Modelyard API</title><style>{STYLE}</style>"
             f"<h1>Modelyard API</h1><p>{escape(document['info']['description'])} "
             "For programs: <a href=/v1/openapi.json>/v1/openapi.json</a>.</p>"]
    for tag in document["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2>")
        for path, methods in document["paths"].items():
            parts += [_section(path, method, op) for method, op in methods.items() if op["tags"] == [tag["name"]]]
    parts.append("<h2>Schemas</h2>")
    for name, schema in document["components"]["schemas"].items():
        label = escape(name)
        parts.append(f"<details id='{label}'><summary><code>{label}</code></summary>{_code(schema)}</details>")
    return "".join(parts)


def _section(path: str, method: str, operation: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td><code>{escape(p['name'])}</code><td>{p['in']}<td>{escape(p.get('description', ''))}"
                   for p in operation["parameters"])
    body = _code(operation["requestBody"]["content"]) if "requestBody" in operation else ""
    return (f"<details><summary><b>{method.upper()}</b><code>{escape(path)}</code> {escape(operation['summary'])}"
            f"</summary><table>{rows}</table>{'<p>Body</p>' + body if body else ''}<p>Answers</p>"
            f"{_code(operation['responses'])}</details>")


def _code(value: Any) -> str:
    text = escape(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
    return "<pre>" + re.sub(r"#/components/schemas/([\w.\-]+)", r"<a href='#\1'>\1</a>", text) + "</pre>"


def routes(services: Sequence[Service], kernel: Sequence[Route]) -> list[Route]:
    """``/v1/openapi.json`` and ``/v1/docs``; both describe themselves as well."""

    @cache
    def document() -> dict[str, Any]:
        return build(declared(services, [*kernel, *own]))

    async def spec(ctx: Context, call: Call) -> web.StreamResponse:
        return reply(await asyncio.to_thread(document))

    async def docs(ctx: Context, call: Call) -> web.StreamResponse:
        html = await asyncio.to_thread(lambda: page(document()))
        return web.Response(text=html, content_type="text/html", headers={
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"})

    own = [Route("GET", "/v1/openapi.json", spec, "This API as OpenAPI 3.1"),
           Route("GET", "/v1/docs", docs, "This API as a page")]
    return own
