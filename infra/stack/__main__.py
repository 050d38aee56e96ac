"""The verbs of the stack: install, start, stop, status; for all servers or those named."""

from __future__ import annotations

import argparse
import sys
import time

from . import SERVERS, StackError, server_class, standins
from .docker import Docker

VERBS = {
    "install": "download what is not cached yet",
    "start": "install, start and wait until they answer",
    "stop": "stop exactly what was started",
    "status": "say what runs, where, and where its log is",
    "missing": "say what this machine cannot run, and why",
    "settings": "print a modelyard.toml for those that run",
    "standins": "put images of public names, made of these servers, into the engine of this stack",
}
SETTINGS = {"kafka": ("bus", ""), "mongo": ("store", ""), "azure": ("blobs", "/modelyard"),
            "registry": ("images", "/modelyard")}
LATER = ("kubernetes",)
"""Started by name only: the first time it is built, for minutes, and few tests want it; they start their own."""
TARGETS = ("docker",)
"""Those that models are deployed to."""


def one(verb: str, name: str) -> str:
    """Does it and tells what came of it."""
    class_ = server_class(name)
    if verb == "missing":
        return class_.missing() or "can run here"
    if verb == "install":
        class_.install()
        return f"installed in {class_.home()}"
    server = class_()
    if verb == "start":
        began = time.monotonic()
        server.start()
        return f"{server.url} ({time.monotonic() - began:.1f} s)"
    if verb == "stop":
        server.stop()
        return "stopped"
    status = server.status()
    return f"{status.state} {status.url} pid {status.pid}, log {status.log}" if status.pid else status.state


def settings(names: list[str]) -> str:
    """The lines of a ``modelyard.toml`` that puts every service on the servers that run."""
    lines = ["# On the servers of `make stack`. A secret in here is the emulator's well-known one."]
    targets = ['local = "process://"']
    for name in names:
        status = server_class(name)().status()
        if status.state == "running" and name in SETTINGS:
            setting, place = SETTINGS[name]
            lines.append(f'{setting} = "{status.url}{place}"')
        elif status.state == "running" and name in TARGETS:
            targets.append(f'{name} = "{status.url}"')
    return "\n".join([*lines, "", "[targets]", *targets])


def stand_in(names: list[str]) -> int:
    """Builds the images named, or all; 0, or 1 when it cannot."""
    try:
        standins.build(Docker(), names or standins.ALL, lambda line: print(line, flush=True))
    except StackError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """0; 1 when a named server could not be had (``--available``: only told)."""
    parser = argparse.ArgumentParser(prog="python -m infra.stack", description=__doc__)
    parser.add_argument("verb", choices=VERBS, help="; ".join(f"{verb}: {what}" for verb, what in VERBS.items()))
    parser.add_argument("servers", nargs="*", metavar="SERVER",
                        help=f"{', '.join(SERVERS)}; standins: {', '.join(standins.ALL)}; none named: all, "
                        f"but start and install leave out {', '.join(LATER)}")
    parser.add_argument("--available", action="store_true", help="a server that cannot run here is no failure")
    args = parser.parse_args()
    failed = False
    names = args.servers or [n for n in SERVERS if n not in LATER or args.verb not in ("start", "install")]
    if args.verb == "standins":
        return stand_in(args.servers)
    if args.verb == "settings":
        print(settings(names))
        return 0
    for name in reversed(names) if args.verb == "stop" else names:
        try:
            print(f"{name:10} {one(args.verb, name)}", flush=True)
        except StackError as exc:
            failed = True
            print(f"{name:10} not here: {exc}", file=sys.stderr, flush=True)
    return 1 if failed and not args.available else 0


if __name__ == "__main__":
    sys.exit(main())
