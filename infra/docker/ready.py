"""For health checks: ends with 0 when the service on this port of loopback is ready, else with 1 and why.

    python -IS /opt/modelyard/ready.py 8701

Standard library, and little of it: it is started every few seconds.
"""

import socket
import sys

with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5) as wire:
    wire.sendall(b"GET /readyz HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
    answer = b""
    while chunk := wire.recv(65536):
        answer += chunk
head, _, body = answer.partition(b"\r\n\r\n")
print(body.decode(errors="replace"))
sys.exit(b" 200 " not in head.partition(b"\r\n")[0])
