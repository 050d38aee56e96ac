"""Logs, traces and metrics."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from modelyard.kernel import observe
from modelyard.kernel.observe import current_trace_id, current_traceparent, fields, in_service, trace_from

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    out = io.StringIO()
    observe.setup_logging("info", stream=out)
    yield out
    root.handlers[:] = before
    root.setLevel(level)


def test_a_log_line_is_one_json_object(lines: io.StringIO) -> None:
    log = logging.getLogger("modelyard.test")
    with trace_from(PARENT):
        log.info("built %s\nand more", "iris:7", extra=fields(image="iris:7", level="not this", n=1, odd=object))
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("failed")
    first, second = (json.loads(line) for line in lines.getvalue().splitlines())
    assert first["message"] == "built iris:7\nand more"
    assert (first["level"], first["image"], first["n"]) == ("info", "iris:7", 1)
    assert first["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["time"])
    assert second["level"] == "error" and "ValueError: no" in second["error"]


async def test_a_log_line_names_its_service(lines: io.StringIO) -> None:
    async def serve(name: str) -> None:
        in_service(name)
        await asyncio.sleep(0)
        logging.getLogger("modelyard.test").info("hello")

    await asyncio.gather(serve("registry"), serve("deployer"))
    logging.getLogger("modelyard.test").info("hello")
    assert [json.loads(x)["service"] for x in lines.getvalue().splitlines()] == ["registry", "deployer", "modelyard"]


def test_a_person_gets_plain_lines() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    out = io.StringIO()
    try:
        observe.setup_logging("info", human=True, stream=out)
        logging.getLogger("x").warning("low disk", extra=fields(free="1 MB"))
        logging.getLogger("x").debug("unseen")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert re.fullmatch(r"\d\d:\d\d:\d\d modelyard  warning: low disk  free=1 MB\n", out.getvalue())


def test_a_trace_goes_on_under_a_span_of_its_own() -> None:
    assert current_traceparent() is None and current_trace_id() is None
    with trace_from(PARENT) as outer:
        assert current_traceparent() == outer != PARENT
        assert outer[:36] == PARENT[:36] and outer.endswith("-01")
        with trace_from(outer) as inner:
            assert inner[:36] == PARENT[:36] and inner != outer
        assert current_traceparent() == outer
    assert current_traceparent() is None


@pytest.mark.parametrize("text", [
    None, "", "nonsense", PARENT.upper(), PARENT[:-1], "ff" + PARENT[2:], f"00-{'0' * 32}-b7ad6b7169203331-01",
    f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
])
def test_a_missing_or_malformed_parent_starts_a_trace(text: str | None) -> None:
    with trace_from(text) as value:
        assert observe.TRACEPARENT.match(value)
        assert "0af7651916cd43dd8448eb211c80319c" not in value


def test_once_says_what_is_new() -> None:
    once = observe.Once()
    assert [once.new("a", "x"), once.new("a", "x"), once.new("b", "x"), once.new("a", "y")] == [True, False, True, True]
    assert once.clear("a") and not once.clear("a")
    assert once.new("a", "y")


def test_metrics_are_prometheus_text() -> None:
    observe.DEAD_LETTERS.labels("test-service", "model.registered").inc()
    text = observe.metrics_text().decode()
    assert 'modelyard_dead_letters_total{service="test-service",type="model.registered"} 1.0' in text
    for name in ("outbox_unsent", "consumer_in_flight", "consumer_oldest_seconds", "handler_seconds", "retries_total",
                 "parked_keys", "loop_seconds", "loop_running"):
        assert f"modelyard_{name}" in text
