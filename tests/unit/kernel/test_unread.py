"""What no HTTP server can read: its sender is told what is wrong, and nobody else is."""

import asyncio
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from modelyard.kernel import web
from tests.unit.kernel.garden import yard


@pytest.mark.parametrize(("sent", "status", "code"), [
    (b"\x16\x03\x01 this is TLS\r\n\r\n", 400, "malformed"),
    (b"GET /livez HTTP/1.1\r\nno colon\r\n\r\n", 400, "malformed"),
    (b"POST /v1/plants HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "malformed"),
    (b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 9_000 + b"\r\n\r\n", 431, "head-too-large")],
    ids=["TLS", "no colon", "chunk", "long"])
async def test_what_cannot_be_read_is_a_problem_and_no_traceback(
        tmp_path: Path, sent: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture) -> None:
    async with yard(tmp_path) as here:
        counted = web.REQUESTS.labels("kernel", "other", "unread", str(status))
        before = counted._value.get()
        url = urlsplit(here.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(sent)
        async with asyncio.timeout(20):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        problem = json.loads(body)
        assert int(head.split()[1]) == problem["status"] == status and problem["code"] == code
        assert b"application/problem+json" in head and problem["request_id"] and problem["title"] != "Error"
        assert counted._value.get() == before + 1 and not caplog.records
        assert (await here.call("GET", "/livez"))[0] == 200
