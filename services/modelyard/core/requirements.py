"""What stands in a list of requirements: the same rules for whoever reads a file of them and for the image builder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement


def requirement(line: str) -> tuple[str, str]:
    """One requirement in normal form and "", or "" and what is wrong with it. A URL is not repeated: it may hold a
    secret."""
    if line.startswith("-"):
        return "", "options are not taken; give name and version: scikit-learn==1.9.1"
    try:
        parsed = Requirement(line)
    except InvalidRequirement as exc:
        if "://" in line:
            return "", "a URL needs a name before it, and must be of a wheel: NAME @ https://HOST/FILE.whl"
        return "", f"'{line}' is not a requirement: {str(exc).splitlines()[0]}"
    if parsed.url is not None:
        url = urlsplit(parsed.url)
        if url.username or url.password:
            return "", "credentials in a URL are refused; set them where the builder's index is configured"
        if url.scheme != "https" or not url.path.endswith(".whl"):
            return "", f"'{parsed.name}': only https URLs of wheels (.whl) are taken"
    return str(parsed), ""


def constraint(line: str) -> tuple[str, str]:
    """One constraint in normal form and "", or "" and what is wrong with it: a name and its versions."""
    text, why = requirement(line)
    if why:
        return "", why
    parsed = Requirement(text)
    if parsed.url is not None or parsed.extras:
        return "", f"'{parsed.name}': a constraint is a name and its versions, without a URL and without extras"
    return text, ""


def logical(text: str) -> Iterator[tuple[int, str]]:
    """Lines with continuations joined and comments gone, each with the number of its first line."""
    held, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        bare = re.sub(r"(^|\s)#.*$", "", line).rstrip()
        if not held:
            first = number
        if bare.endswith("\\"):
            held += bare[:-1] + " "
            continue
        whole, held = (held + bare).strip(), ""
        if whole:
            yield first, whole
    if held.strip():
        yield first, held.strip()
