"""Makes a MongoDB server on loopback a replica set of one node, which Modelyard needs. Repeating is fine.

    python replica_set.py 27017      # the port here, which must be its own as well: by it the node finds itself
"""

import sys
import time

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

ALREADY, PATIENCE_S = 23, 120  # AlreadyInitialized

port = int(sys.argv[1])
wanted = {"_id": "rs0", "members": [{"_id": 0, "host": f"127.0.0.1:{port}"}]}
until = time.monotonic() + PATIENCE_S
with MongoClient("127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=2000) as client:
    while True:
        try:
            if client.admin.command("hello").get("isWritablePrimary"):
                break
            client.admin.command("replSetInitiate", wanted)
        except PyMongoError as exc:
            if time.monotonic() > until:
                sys.exit(f"127.0.0.1:{port} does not become a replica set: {exc}")
            if not (isinstance(exc, OperationFailure) and exc.code == ALREADY):
                print(f"127.0.0.1:{port}: {exc}; trying again", flush=True)
        time.sleep(0.2)
print(f"127.0.0.1:{port} is the replica set rs0")
