"""What a Dockerfile says, as far as it matters before it is built. Pure; the builder has the last word on the rest.

Only what decides something is read: the images it stands on, and what would have the builder itself, whose network is
not that of the steps, fetch a URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..core.errors import BuildFailed

NAME = "Dockerfile"
LARGEST = 1 << 20
SCRATCH = "scratch"
GOES_ON = re.compile(r"\\[ \t]*\Z")
DIRECTIVE = re.compile(r"#\s*escape\s*=\s*(\S)", re.IGNORECASE)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
FROM_OPTION = re.compile(r"--from=(\S+)")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(word in capitals, what follows it), lines joined as the builder joins them. BuildFailed for another escape
    character than the backslash."""
    held = ""
    for number, raw in enumerate(text.lstrip("\ufeff").split("\n")):
        line = raw.rstrip("\r")
        if line.lstrip().startswith("#"):
            found = DIRECTIVE.match(line.strip())
            if found and found[1] != "\\":
                raise BuildFailed(f"{NAME}:{number + 1}: another escape character than the backslash is not taken")
            continue
        if not line.strip():
            continue
        if GOES_ON.search(line):
            held += GOES_ON.sub("", line)
            continue
        word, _, rest = (held + line).strip().partition(" ")
        yield _split(word, rest)
        held = ""
    if held.strip():
        word, _, rest = held.strip().partition(" ")
        yield _split(word, rest)


def _split(word: str, rest: str) -> tuple[str, str]:
    first, tab, more = word.partition("\t")
    return first.upper(), (more + tab + rest if tab else rest).strip()


def images(text: str) -> list[str]:
    """The images that it takes from elsewhere, each once, in order: not its own stages, and not ``scratch``."""
    arguments: dict[str, str] = {}
    stages: set[str] = set()
    found: dict[str, None] = {}
    for word, rest in instructions(text):
        if word == "ARG" and not stages and not found:
            arguments |= _arguments(rest)
        elif word == "FROM":
            parts = [part for part in rest.split() if not part.startswith("--")]
            name = _filled(parts[0], arguments) if parts else SCRATCH
            if name.lower() not in stages and name != SCRATCH:
                found[name] = None
            stages.add(parts[2].lower() if len(parts) == 3 else str(len(stages)))
        elif word == "COPY":
            others = [name for name in FROM_OPTION.findall(rest) if name.lower() not in stages]
            found |= {name: None for name in others if not name.isdecimal()}
    return list(found)


def _arguments(rest: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in rest.split())
    return {name: value.strip("\"'") for name, equals, value in pairs if equals}


def _filled(name: str, arguments: dict[str, str]) -> str:
    return VARIABLE.sub(lambda m: arguments.get(m[1] or m[3]) or m[2] or "", name).strip("\"'")


def refused(text: str) -> list[str]:
    """What is not built, whatever the builder would say."""
    problems = []
    for word, rest in instructions(text):
        while word == "ONBUILD":
            word, rest = _split(*rest.partition(" ")[::2])
        if word == "ADD" and _fetches(rest):
            problems.append(f"ADD {rest[:120]}: files of the folder are added by plain names; what lies elsewhere is "
                            "fetched by a RUN step, in the network that steps have")
    return problems


def _fetches(rest: str) -> bool:
    """Whether it may name a URL, in whatever disguise: the builder takes quotes away and fills variables in."""
    bare = rest.replace('"', "").replace("'", "")
    return any(sign in bare for sign in ("://", "$", "\\", "git@"))
