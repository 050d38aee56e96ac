"""What is sent, as bytes, and the statuses of the answers. ``PLAIN`` is ours to read, ``OTHERS`` is not; after ``LAST``
the connection ends."""

from __future__ import annotations

import gzip
import json
import zlib

import numpy as np

from tests.unit.rest.http1 import chunked, get, post

LIMIT = 4096
"""Of a body."""
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.5]}
INFER = "/v2/models/flower/infer"
BINARY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters":
                                 {"binary_data_size": 8}}]}).encode()


def _packed(data: bytes, how: str) -> bytes:
    body = gzip.compress(data, mtime=0) if how == "gzip" else zlib.compress(data)
    return post(body, headers=[f"Content-Encoding: {how}"])


def _infer(document: object, *headers: str) -> bytes:
    return post(document if isinstance(document, bytes) else json.dumps(document).encode(), INFER, headers)


PLAIN: dict[str, tuple[bytes, list[int]]] = {
    "get": (get(), [200]), "healthy": (get("/"), [200]), "ready": (get("/v2/health/ready"), [200]),
    "swagger": (get("/swagger.json?version=3"), [200]), "no swagger": (get("/swagger.json?version=4"), [404]),
    "a query that means nothing": (get("/v2?x=/y"), [200]),
    "score": (post(), [200]), "no body": (get("/score", "POST"), [400]), "not json": (post(b"{"), [400]),
    "metadata": (get("/v2/models/flower"), [200]), "model ready": (get("/v2/models/flower/versions/7/ready"), [200]),
    "no model": (get("/v2/models/rose"), [404]), "no version": (get("/v2/models/flower/versions/9"), [404]),
    "infer": (_infer({"id": "9", "inputs": [TENSOR]}), [200]),
    "versioned": (post(json.dumps({"inputs": [TENSOR]}).encode(), "/v2/models/flower/versions/7/infer"), [200]),
    "infer no model": (post(b"{}", "/v2/models/rose/infer"), [404]),
    "infer nothing": (_infer({"inputs": []}), [400]),
    "binary": (_infer(BINARY + np.ones(2, "f4").tobytes(), f"Inference-Header-Content-Length: {len(BINARY)}"), [200]),
    "a wrong length": (_infer(BINARY, "inference-header-content-length: ten"), [400]),
    "a length beyond": (_infer(BINARY, "Inference-Header-Content-Length: 99999"), [400]),
    "own id": (post(headers=["X-Request-Id: mine", "Traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01"]), [200]),
    "a bad id": (post(headers=["x-request-id: " + "a" * 200]), [200]),
    "a body nobody wants": (get()[:-2] + b"Content-Length: 3\r\n\r\nabc", [200]),
    "nowhere": (get("/nowhere"), [404]), "nowhere posted": (post(path="/v2/models/flower/no"), [404]),
    "too deep": (get("/v2/models/flower/versions/7/ready/x"), [404]), "empty name": (get("/v2/models//ready"), [404]),
    "dots": (get("/v2/./health/../health/live"), [404]), "two slashes": (get("/v2//x"), [404]),
    "post to get": (post(path="/v2"), [405]), "get of post": (get("/score"), [405]),
    "delete": (get("/metrics", "DELETE"), [405]), "options": (get("/score", "OPTIONS"), [405]),
    "three in a row": (get("/v2/health/live") + post(b'{"sleep":0.05}') + get("/score"), [200, 200, 405]),
    "keep-alive": (get(headers=["Host: x", "Connection: Keep-Alive"]), [200]),
}
OTHERS: dict[str, tuple[bytes, list[int]]] = {
    "http/1.0 kept": (get(version="1.0", headers=["Connection: keep-alive"]), [200]),
    "percent": (get("/v2/models/%66lower"), [200]), "absolute": (get("http://x/v2"), [200]),
    "odd method": (get("/v2", "PROPFIND"), [405]), "fragment": (get("/v2#x"), [200]),
    "leading line ends": (b"\r\n" + get(), [200]), "chunked": (chunked(b"[1", b"]"), [200]),
    "chunked, then plain": (chunked(b"[1]") + post(), [200, 200]),
    "plain, then chunked": (post() + chunked(b"[2]") + get("/nowhere"), [200, 200, 404]),
    "chunked too large": (chunked(b"1" * (LIMIT + 1)), [413]),
    "gzip": (_packed(b"[1]", "gzip"), [200]), "deflate": (_packed(b"[1]", "deflate"), [200]),
    "gzip too large": (_packed(b"1" * (LIMIT + 1), "gzip"), [413]),
    "an unknown encoding": (post(headers=["Content-Encoding: snappy"]), [415]),
    "several encodings": (post(headers=["Content-Encoding: gzip, aes"]), [415]),
    "another expectation": (post(headers=["Expect: mercy"]), [417]),
    "upgrade": (get(headers=["Host: x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"]),
                [200]),
}
LAST: dict[str, tuple[bytes, list[int]]] = {
    "close": (get(headers=["Host: x", "Connection: close"]), [200]),
    "close, posted": (post(headers=["connection: Close"]), [200]),
    "http/1.0": (get(version="1.0", headers=[]), [200]),
    "no host": (get(headers=["X: y"]), [400]), "two hosts": (get(headers=["Host: x", "Host: y"]), [400]),
    "two lengths": (post(headers=["Content-Length: 4"]), [400]), "minus": (post(b"", length=-3), [400]),
    "length and chunked": (chunked(b"[1]", headers=["Content-Length: 3"]), [400]),
    "a bad chunk": (get("/score", "POST", headers=["Host: x", "Transfer-Encoding: chunked"]) + b"zz\r\n", [400]),
    "garbage": (b"\0\1\2garbage\r\n\r\n", [400]), "no method": (b"GARBAGE\r\n\r\n", [400]),
    "a bad name": (get(headers=["Host: x", "a b: c"]), [400]), "no colon": (get(headers=["Host: x", "abc"]), [400]),
    "folded": (get(headers=["Host: x", "a: b", " c"]), [400]), "http/3": (get(version="3.1"), [400]),
    "bare line ends": (b"GET /v2 HTTP/1.1\nHost: x\n\n", [400]),
    "a long path": (get("/" + "a" * 9_000), [431]),
    "a long header": (get(headers=["Host: x", "a: " + "b" * 9_000]), [431]),
    "many headers": (get(headers=["Host: x", *(f"a{n}: b" for n in range(300))]), [431]),
    "not gzip": (post(b"[1]", headers=["Content-Encoding: gzip"]), [400]),
    "an encoding that is not installed": (post(headers=["Content-Encoding: br"]), [415]),
    "a zero byte": (get(headers=["Host: x", "a: b\0c"]), [400]),
}
