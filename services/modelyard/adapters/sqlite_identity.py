"""Who a member of a consumer group is, so that the death of its process is noticed before its lease ends."""

from __future__ import annotations

import os
import secrets


def identity() -> str:
    """A name for one member: which process it lives in, and which of its members it is."""
    return f"{_namespace()}/{os.getpid()}/{_started(os.getpid())}/{secrets.token_hex(4)}"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown"


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did: tells it from a later one with the same number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return "0"


def dead(member: str) -> bool:
    """True when the member's process is known to be gone; False when in doubt, for its lease will tell."""
    namespace, pid, started, _ = member.split("/")
    if namespace != _namespace() or namespace == "unknown":
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _started(int(pid)) not in (started, "0")
