"""uv as a process: bounded in time, in a group of its own that dies with the build, with a clean environment."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import re
import signal
import sys
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..core.errors import BuildFailed, Unavailable
from ..kernel import proxies
from .locks import Lock, read_lock
from .log import CREDENTIALS, BuildLog

RESOLVE_S, INSTALL_S = 300.0, 1200.0
PLATFORMS = {"linux/amd64": "x86_64-manylinux_2_28", "linux/arm64": "aarch64-manylinux_2_28"}
PASSED = re.compile(
    r"^(PATH|HOME|LANG|TMPDIR|XDG_(CACHE|CONFIG)_HOME|SSL_CERT_(FILE|DIR)|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy"
    r"|NETRC|UV_(CACHE_DIR|DEFAULT_INDEX|INDEX|INDEX_URL|INDEX_STRATEGY|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|OFFLINE"
    r"|SYSTEM_CERTS|NATIVE_TLS|INSECURE_HOST|KEYRING_PROVIDER|HTTP_TIMEOUT|HTTP_RETRIES|CONFIG_FILE|NO_CACHE"
    r"|EXCLUDE_NEWER|CONCURRENT_\w+)|UV_INDEX_\w+_(USERNAME|PASSWORD))$")
DECIDES = re.compile(r"^(XDG_CONFIG_HOME|UV_(DEFAULT_INDEX|INDEX|INDEX_URL|INDEX_STRATEGY|EXTRA_INDEX_URL|FIND_LINKS"
                     r"|NO_INDEX|CONFIG_FILE|EXCLUDE_NEWER))$")
QUIET = ("--color", "never", "--no-progress")
EXPLAINED = re.compile(r"[×╰─▶│|]+|\bcause:")
FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded|os error 122|os error 27")
HELPS = re.compile(r"only found wheels|Wheels are available|could not be queried")
"""In uv's hints: for which platforms there are wheels, which index wants credentials. The others are about uv."""
LACKING = re.compile(r"Wheels are required for `([A-Za-z0-9._-]+)` because building from source is disabled")
OFFLINE = re.compile(r"error sending request|dns error|Failed to fetch|network (was|is) disabled", re.IGNORECASE)


@dataclass(frozen=True)
class Sdist:
    """A package that exists only as source. ``sha256`` is "" where the index does not tell."""

    name: str
    version: str
    file: str
    url: str
    sha256: str


def environment(links: Path | None = None) -> dict[str, str]:
    """What uv may see: where its index, cache and certificates are; nothing of ours, no secret of somebody else's.
    ``links``: one more folder of wheels."""
    kept = {name: value for name, value in os.environ.items() if PASSED.match(name)}
    kept |= proxies.told(kept)
    if links is not None:
        kept["UV_FIND_LINKS"] = ",".join(filter(None, [kept.get("UV_FIND_LINKS", ""), str(links)]))
    return {"PATH": "/usr/bin:/bin", **kept}


def index() -> dict[str, str]:
    """The settings that decide what uv finds, whatever it is asked for."""
    return {name: value for name, value in environment().items() if DECIDES.match(name)}


def target(python: str, platform: str) -> list[str]:
    """The options that say for whom packages are chosen: the same wheels whatever machine asks."""
    return ["--python", sys.executable, "--python-version", python, "--python-platform", PLATFORMS[platform],
            "--only-binary", ":all:"]


async def resolve(
    wanted: Sequence[str], bounds: Sequence[str], python: str, platform: str, folder: Path, log: BuildLog,
    links: Path | None = None,
) -> Lock:
    """The lock of these requirements within these constraints. BuildFailed with uv's explanation when there is none."""
    asked, answered, within = (folder / f"requirements.{end}" for end in ("in", "lock", "constraints"))
    await asyncio.to_thread(asked.write_text, "".join(f"{line}\n" for line in wanted), "utf-8")
    await asyncio.to_thread(within.write_text, "".join(f"{line}\n" for line in bounds), "utf-8")
    await run("resolving the requirements", ["pip", "compile", asked.name, "--output-file", answered.name,
              "--constraints", within.name,
              "--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--quiet", *QUIET,
              *target(python, platform)], folder, RESOLVE_S, log, links)
    lock, problems = read_lock(await asyncio.to_thread(answered.read_text, "utf-8"))
    if problems:
        raise BuildFailed(f"the resolved requirements cannot be locked: {problems[0]}")
    return lock


async def install(lock: Lock, python: str, platform: str, folder: Path, log: BuildLog,
                  links: Path | None = None) -> Path:
    """Unpacks exactly the locked wheels into a folder; nothing of them is run or built."""
    listed, into = folder / "requirements.lock", folder / "site-packages"
    await asyncio.to_thread(listed.write_text, lock.text, "utf-8")
    await run_known("installing the packages", ["pip", "install", "--requirements", listed.name, "--target", into.name,
              "--require-hashes", "--no-deps", "--no-compile-bytecode", *QUIET, *target(python, platform)],
              folder, INSTALL_S, log, links)
    return into


async def toolbox(lock: Lock, python: str, folder: Path, log: BuildLog, links: Path | None = None) -> Path:
    """An environment of exactly the locked wheels that can be moved. Nothing of them is run: not even by looking into
    it again, for a wheel may have code run whenever its environment's Python starts."""
    listed, into = folder / "tools.lock", folder / "tools"
    await asyncio.to_thread(listed.write_text, lock.text, "utf-8")
    await run("making the build environment", ["venv", "--relocatable", "--no-project", "--python", python, into.name,
              *QUIET], folder, INSTALL_S, log)
    if lock.pins:
        await run("installing the build requirements", ["pip", "install", "--python", into.name, "--requirements",
                  listed.name, "--require-hashes", "--no-deps", "--no-compile-bytecode", "--only-binary", ":all:",
                  *QUIET], folder, INSTALL_S, log, links)
    return into


async def source(wanted: str, python: str, platform: str, folder: Path, log: BuildLog) -> Sdist | None:
    """The sdist of the newest version that one requirement allows, or None where uv finds none or a wheel beside it.
    That it depends on nothing is said beforehand, so that uv has no reason to build it."""
    name = canonicalize_name(Requirement(wanted).name)
    asked, told, config = folder / "source.in", folder / "pylock.source.toml", folder / "uv.toml"
    await asyncio.to_thread(asked.write_text, f"{wanted}\n", "utf-8")
    given = environment().get("UV_CONFIG_FILE")
    text = await asyncio.to_thread(Path(given).read_text, "utf-8") if given else ""
    await asyncio.to_thread(config.write_text, f'{text}\n[[dependency-metadata]]\nname = "{name}"\n', "utf-8")
    options = target(python, platform)[:-2]
    await run(f"looking for the source of {name}", [
        "pip", "compile", asked.name, "--format", "pylock.toml", "--output-file", told.name, "--no-deps", "--no-header",
        "--no-annotate", "--quiet", *(("--config-file", config.name) if given else ()), *QUIET, *options],
        folder, RESOLVE_S, log)
    await asyncio.to_thread(config.unlink)
    found = tomllib.loads(await asyncio.to_thread(told.read_text, "utf-8")).get("packages", [])
    sdist = found[0].get("sdist") if len(found) == 1 and not found[0].get("wheels") else None
    if sdist is None:
        return None
    where = str(sdist.get("url") or (folder / str(sdist.get("path"))).as_uri())
    sha256 = str(sdist.get("hashes", {}).get("sha256", ""))
    return Sdist(name, str(found[0]["version"]), _file_name(sdist), where, sha256)


async def wheels(lock: Lock, python: str, platform: str, folder: Path, log: BuildLog,
                 links: Path | None = None) -> dict[str, str]:
    """The wheels that ``install`` may take, by file name, with their sha256. BuildFailed when the index, which was
    there for the installation, does not tell."""
    listed, told = folder / "installed.lock", folder / "pylock.toml"
    await asyncio.to_thread(listed.write_text, lock.text, "utf-8")
    await run_known("looking up the wheels", ["pip", "compile", listed.name, "--format", "pylock.toml", "--output-file",
              told.name, "--no-deps", "--no-header", "--no-annotate", "--quiet", *QUIET, *target(python, platform)],
              folder, RESOLVE_S, log, links)
    found = tomllib.loads(await asyncio.to_thread(told.read_text, "utf-8"))
    each = [wheel for one in found.get("packages", ()) for wheel in one.get("wheels", ())]
    return {_file_name(wheel): str(wheel.get("hashes", {}).get("sha256", "")) for wheel in each}


def _file_name(wheel: Mapping[str, Any]) -> str:
    given = wheel.get("name") or urlsplit(str(wheel.get("url") or wheel.get("path"))).path
    return unquote(str(given).rpartition("/")[2])


async def run_known(what: str, arguments: Sequence[str], folder: Path, seconds: float, log: BuildLog,
                    *more: Any) -> None:
    """As ``run``, of what is locked: when the index does not answer, uv's cache may have all that is needed."""
    try:
        await run(what, arguments, folder, seconds, log, *more)
    except BuildFailed as exc:
        if not exc.detail.get("unreachable"):
            raise
        await log.line("the package index does not answer; looking for the locked wheels in uv's cache")
        try:
            await run(what, [*arguments, "--offline"], folder, seconds, log, *more)
        except BuildFailed:
            raise exc from None


async def run(what: str, arguments: Sequence[str], folder: Path, seconds: float, log: BuildLog,
              links: Path | None = None) -> None:
    """Runs uv; what it says goes to the log line by line. BuildFailed with the heart of it when it fails; ``lacking``
    in its detail are the packages that have no wheel."""
    program = await asyncio.to_thread(_binary)
    more = ("--no-index",) if arguments[0] == "pip" and _on(os.environ.get("UV_NO_INDEX", "")) else ()
    process = await asyncio.create_subprocess_exec(
        program, *arguments, *more, cwd=folder, env=environment(links), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True, limit=1 << 20)
    said: list[str] = []
    try:
        async with asyncio.timeout(seconds):
            assert process.stdout is not None
            async for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                said.append(line)
                await log.line(f"  uv: {line}")
            await process.wait()
    except TimeoutError:
        raise BuildFailed(f"{what} took longer than {seconds:.0f} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        if FULL.search("\n".join(said)):
            raise Unavailable(f"{what} failed: the disk is full ({folder}, or uv's cache); free some space")
        text = " ".join(said)
        lacking = sorted({canonicalize_name(found) for found in LACKING.findall(text)})
        raise BuildFailed(f"{what}{_whom(arguments)} failed: {explain(said)}",
                          unreachable=bool(OFFLINE.search(text)), lacking=lacking)


def _on(text: str) -> bool:
    """Of a switch in the environment. uv itself knows some of them as options only."""
    return text.lower() in ("1", "true", "yes", "on")


def _whom(arguments: Sequence[str]) -> str:
    """For whom packages are chosen, as ``target`` says it."""
    said = dict(itertools.pairwise(arguments))
    names = {ours: name for name, ours in PLATFORMS.items()}
    platform = names.get(said.get("--python-platform", ""))
    return f" for {platform} and Python {said.get('--python-version')}" if platform else ""


def explain(said: Sequence[str]) -> str:
    """One line out of uv's report."""
    text = " ".join(" ".join(EXPLAINED.sub(" ", line) for line in said).split())
    text = CREDENTIALS.sub("***@", text.partition("error: ")[2] or text)
    if OFFLINE.search(text):
        return f"the package index does not answer; see the log ({text[:300]})"
    text, *hints = text.split(" hint: ")
    hint = "".join(f" ({one})" for one in dict.fromkeys(hints) if HELPS.search(one))[:500]
    text = re.sub("^No solution found when resolving dependencies:? ", "", text)
    return text[:1000 - len(hint)] + hint or "uv gave no reason"


@functools.cache
def _binary() -> str:
    import uv

    try:
        return str(uv.find_uv_bin())
    except FileNotFoundError as exc:
        raise BuildFailed("uv is not installed beside Modelyard; install it with: pip install uv") from exc


