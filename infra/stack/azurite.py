"""Azure Blob Storage on this machine: Azurite, its blob service only, from npm.

It keeps metadata in memory between saves: SIGKILL loses blobs that it has acknowledged, so ``kill`` refuses. Freeze it,
or put a proxy before it.
"""

from __future__ import annotations

import http.client
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from .server import Server, StackError, needs, run

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The emulator's well-known credentials: they are in its documentation and guard nothing."""


class Azurite(Server):
    """``azure://devstoreaccount1:KEY@127.0.0.1:PORT/devstoreaccount1``; a container's name goes behind it."""

    name: ClassVar[str] = "azure"
    version: ClassVar[str] = "3.37.0"

    @classmethod
    def missing(cls) -> str:
        return needs(node="install Node.js 20 or newer", npm="install npm, which comes with Node.js")

    @classmethod
    def installed(cls) -> bool:
        return cls._program().exists()

    @classmethod
    def _program(cls) -> Path:
        return cls.home() / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"

    @classmethod
    def _install(cls) -> None:
        draft = cls.home().with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        run("npm", "install", "--prefix", str(draft), "--no-save", "--no-package-lock", "--no-audit", "--no-fund",
            "--ignore-scripts", "--omit=optional", "--loglevel=error", f"azurite@{cls.version}")
        shutil.rmtree(cls.home(), ignore_errors=True)
        draft.rename(cls.home())

    def _command(self) -> Sequence[str]:
        return ("node", str(self._program()), "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location",
                str(self.data), "--silent", "--skipApiVersionCheck", "--disableTelemetry")

    def answers(self) -> bool:
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            wire.request("GET", f"/{ACCOUNT}?comp=list")
            return wire.getresponse().status in (200, 400, 403)
        except (OSError, http.client.HTTPException):
            return False
        finally:
            wire.close()

    def kill(self) -> None:
        """Not a fault that a loss test may use; see above. A start that failed is ended by SIGTERM."""
        if self.answers():
            raise StackError("azurite loses acknowledged blobs when it is killed: freeze it, or cut a proxy before it")
        self.stop()

    @property
    def url(self) -> str:
        return f"azure://{ACCOUNT}:{quote(KEY, safe='')}@127.0.0.1:{self.port}/{ACCOUNT}"
