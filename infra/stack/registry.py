"""An OCI registry: CNCF Distribution, as Debian packages it, on loopback without TLS."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Sequence
from pathlib import Path

from .server import Server, StackError, apt_install, can_apt, needs

CONFIG = """\
version: 0.1
log:
  level: info
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: {data}
  delete:
    enabled: {deletes}
  maintenance:
    uploadpurging:
      enabled: true
      age: 24h
      interval: 1h
      dryrun: false
http:
  addr: 127.0.0.1:{port}
  secret: {secret}
{more}"""


class Registry(Server):
    """``htpasswd``: lines of user and bcrypt hash; with them it wants basic authentication. ``deletes``: whether it
    deletes anything, which this registry does not by itself."""

    name = "registry"
    version = "2.8.2"
    start_s = 30.0
    stop_s = 10.0

    def __init__(self, folder: Path | None = None, port: int = 0, htpasswd: str = "",
                 deletes: bool = True) -> None:
        super().__init__(folder, port)
        self.htpasswd, self.deletes = htpasswd, deletes

    @property
    def url(self) -> str:
        return f"oci://127.0.0.1:{self.port}"

    @classmethod
    def missing(cls) -> str:
        return "" if cls.installed() else can_apt()

    @classmethod
    def installed(cls) -> bool:
        return not needs(**{"docker-registry": ""})

    @classmethod
    def _install(cls) -> None:
        apt_install("docker-registry")
        if not cls.installed():
            raise StackError("registry: Debian's docker-registry was installed and brought no docker-registry")

    def _prepare(self) -> None:
        more = ""
        if self.htpasswd:
            (self.folder / "htpasswd").write_text(self.htpasswd)
            more = f"auth:\n  htpasswd:\n    realm: modelyard\n    path: {self.folder / 'htpasswd'}\n"
        # the secret signs the state of uploads: the same after a restart, so that they can be resumed
        (self.folder / "config.yml").write_text(CONFIG.format(
            data=self.data, port=self.port, secret=f"modelyard-{self.port}", more=more,
            deletes=str(self.deletes).lower()))

    def _command(self) -> Sequence[str]:
        return ["docker-registry", "serve", str(self.folder / "config.yml")]

    def answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
            try:
                asked.request("GET", "/v2/")
                return asked.getresponse().status in (200, 401)
            finally:
                asked.close()
        return False
