"""``/swagger.json``: what ``/score`` takes and gives, as Swagger 2 or OpenAPI 3."""

from __future__ import annotations

from typing import Any

from ..core.version import __version__
from .runners import Runner

FORMATS = {"BOOL": {"type": "boolean"}, "BYTES": {"type": "string"}}


def describe(deployment: str, runner: Runner | None, version: int) -> dict[str, Any]:
    """The document for ``version`` 2 or 3. Without a runner (several models) ``/score`` is described freely."""
    body = _input(runner)
    if runner is not None and runner.sample is not None:
        body = {**body, "example": runner.sample}
    failed = {"description": "A problem document that says what is wrong"}
    operation: dict[str, Any] = {"operationId": "score", "summary": "Score one request"}
    if version == 2:
        operation |= {"consumes": ["application/json"], "produces": ["application/json"],
                      "parameters": [{"name": "body", "in": "body", "required": True, "schema": body}],
                      "responses": {"200": {"description": "The result", "schema": {}}, "default": failed}}
        head: dict[str, Any] = {"swagger": "2.0", "schemes": ["http", "https"]}
    else:
        answer = {"description": "The result", "content": {"application/json": {"schema": {}}}}
        operation |= {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                      "responses": {"200": answer, "default": failed}}
        head = {"openapi": "3.0.3"}
    alive: dict[str, Any] = {"operationId": "healthy", "summary": "Healthy", "responses": {
        "200": {"description": "The text Healthy"}}}
    return {**head, "info": {"title": deployment, "version": __version__},
            "paths": {"/": {"get": alive}, "/score": {"post": operation}}}


def _input(runner: Runner | None) -> dict[str, Any]:
    if runner is None or not runner.inputs:
        return {"description": "Any JSON; by custom an object with data, or an object of columns"}
    if len(runner.inputs) == 1:
        return {"type": "object", "required": ["data"], "properties": {"data": _nested(runner.inputs[0])}}
    return {"type": "object", "required": [slot.name for slot in runner.inputs],
            "properties": {slot.name: _nested(slot) for slot in runner.inputs}}


def _nested(slot: Any) -> dict[str, Any]:
    kind = "number" if slot.datatype[:2] in ("FP", "BF") else "integer"
    schema: dict[str, Any] = dict(FORMATS.get(slot.datatype, {"type": kind}))
    for size in reversed(slot.shape):
        schema = {"type": "array", "items": schema}
        if size > 0:
            schema |= {"minItems": size, "maxItems": size}
    return schema
