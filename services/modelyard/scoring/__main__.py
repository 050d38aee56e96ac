"""``serve``: answer scoring calls. ``ship``: move closed capture segments to the blob store."""

from __future__ import annotations

import contextlib
import os
import sys

USAGE = "usage: launch.py serve [--grpc ADDR] [--http ADDR] [--admin ADDR] [--transport NAME] [--spool DIR]\n"\
        "       launch.py ship --spool DIR --grant URL [--once]\n"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def main(argv: list[str] | None = None) -> int:
    """The exit status. Does not return from ``serve`` in a process of its own: see ``_leave``."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("serve", [])
    if command == "ship":
        from .shipper import main as ship

        return ship(rest) or 0
    if command != "serve":
        sys.stderr.write(USAGE)
        return 0 if command in ("-h", "--help") else 2
    return _leave(_serve(rest))


def _serve(rest: list[str]) -> int:
    from . import garbage

    garbage.loading()
    from ..core.errors import ModelyardError
    from .settings import Settings

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _keep_memory()
    try:
        settings = Settings.read(rest)
        from .serve import serve

        return serve(settings)
    except ModelyardError as exc:
        sys.stderr.write(f"modelyard: cannot start: {exc.message}\n")
        return 2


def _keep_memory() -> None:
    """Keeps glibc from giving memory back after every larger message: twice the throughput at 64 KiB."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((M_TRIM_THRESHOLD, 64 << 20), (M_TOP_PAD, 1 << 20), (M_MMAP_THRESHOLD, 4 << 20)):
            libc.mallopt(option, value)


def _leave(status: int) -> int:
    """Ends the process at once: threads that user code left behind must not keep a drained replica alive."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
