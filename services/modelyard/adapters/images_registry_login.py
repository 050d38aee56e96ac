"""Credentials for a registry, from where ``docker login`` puts them: Docker's own config file and its helpers.

The file is ``$DOCKER_CONFIG/config.json``, else ``~/.docker/config.json``. A host's own helper (``credHelpers``) goes
before the one for all hosts (``credsStore``), and that before what stands in the file (``auths``).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import Invalid
from .folder import in_thread

HUB, HUB_KEY = "docker.io", "https://index.docker.io/v1/"
HELPER_S = 20.0
HELPER = re.compile(r"^[A-Za-z0-9._\-]{1,64}$")
IDENTITY = "<token>"


@dataclass(frozen=True)
class Login:
    """User and password; or ``identity``, a token to get others with; or ``token``, which the registry takes itself."""

    user: str = ""
    password: str = ""
    identity: str = ""
    token: str = ""

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def config_file() -> Path:
    """Where Docker's config is looked for."""
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


async def login(host: str) -> Login | None:
    """What is known for ``HOST[:PORT]``, read anew each time; None when nothing is. Invalid, naming the file, when it
    or a helper that it names is no good."""
    config = await in_thread(_read)
    helper = _under(config.get("credHelpers"), host) or config.get("credsStore")
    if helper:
        found = await _ask_helper(str(helper), host)
        if found is not None:
            return found
    entry = _under(config.get("auths"), host)
    return _entry(entry) if isinstance(entry, dict) else None


def _read() -> dict[str, Any]:
    path = config_file()
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise Invalid(f"the credentials of registries in {path} cannot be read: {exc}; mend the file, or move it away "
                      "and run docker login again") from exc
    return found if isinstance(found, dict) else {}


def _keys(host: str) -> list[str]:
    """How a host may be written in the file."""
    if host == HUB:
        return [HUB_KEY, HUB]
    return [host, *(f"{scheme}://{host}{path}" for scheme in ("https", "http") for path in ("", "/", "/v1/", "/v2/"))]


def _under(table: Any, host: str) -> Any:
    if not isinstance(table, dict):
        return None
    return next((table[key] for key in _keys(host) if key in table), None)


def _entry(entry: dict[str, Any]) -> Login | None:
    if entry.get("registrytoken"):
        return Login(token=str(entry["registrytoken"]))
    if entry.get("identitytoken"):
        return Login(identity=str(entry["identitytoken"]))
    if entry.get("auth"):
        with contextlib.suppress(ValueError):
            user, colon, password = base64.b64decode(entry["auth"]).decode().rstrip("\0").partition(":")
            if colon:
                return Login(user, password)
        raise Invalid(f"{config_file()} holds an 'auth' that is not base64 of user:password; run docker login again")
    if entry.get("username"):
        return Login(str(entry["username"]), str(entry.get("password", "")))
    return None


async def _ask_helper(helper: str, host: str) -> Login | None:
    """``docker-credential-NAME get``, as Docker calls it."""
    program = f"docker-credential-{helper}"
    if not HELPER.match(helper):
        raise Invalid(f"{config_file()} names the credential helper '{helper[:64]}', which cannot be one")
    try:
        process = await asyncio.create_subprocess_exec(
            program, "get", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL)
    except OSError as exc:
        raise Invalid(f"{config_file()} names the credential helper {program}, which cannot be run ({exc.strerror}); "
                      "install it, or take it out of that file") from exc
    try:
        async with asyncio.timeout(HELPER_S):
            said, _ = await process.communicate(_keys(host)[0].encode())
    except TimeoutError:
        raise Invalid(f"{program} did not answer within {HELPER_S:.0f} s; try: echo {host} | {program} get") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:  # it has nothing for this host
        return None
    try:
        found = json.loads(said)
        user, secret = str(found["Username"]), str(found["Secret"])
    except (ValueError, KeyError, TypeError) as exc:
        raise Invalid(f"{program} did not answer as a credential helper does; try: echo {host} | {program} get"
                      ) from exc
    return Login(identity=secret) if user == IDENTITY else Login(user, secret)
