"""The inside of the sandbox: a program by itself (standard library only) that makes it and is its first process.

Started by ``sandbox.py`` with a plan as one line of JSON on stdin. It leaves the machine's mounts, processes, network
and IPC for new ones, sees of the files only what the plan shows (read-only) and one memory file system of bounded size,
gives up every right, and runs one command. When that is over, or over a limit, everything inside is killed; what lies
in ``/out`` is written to a pipe behind one line of JSON that says how it went. End of file on stdin: the builder is
gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
SPACES = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWPID | NEWNET
RDONLY, NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
DETACH, RECURSIVE, PATH_FD = 2, 0x8000, -100
DUMPABLE, SECCOMP, NO_NEW_PRIVS, AMBIENT, CLEAR_ALL = 4, 22, 38, 47, 4
MOUNT_SETATTR = 442
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SETTINGS = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
DEVICES = ("null", "zero", "full", "random", "urandom")
NOBODY, INSIDE = 65534, 1000
OWN_USERS, USERS = 2_000_000_000, 1_000_000
LOOK_S = 0.05
CALLS = {  # the numbers of system calls; what is not in the kernel's table of a machine has no way in
    "x86_64": (0xC000003E, {
        "socket": 41, "clone": 56, "ptrace": 101, "pivot_root": 155, "mount": 165, "umount2": 166, "add_key": 248,
        "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "userfaultfd": 323}),
    "aarch64": (0xC00000B7, {
        "umount2": 39, "mount": 40, "pivot_root": 41, "unshare": 97, "ptrace": 117, "socket": 198, "add_key": 217,
        "request_key": 218, "keyctl": 219, "clone": 220, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "bpf": 280, "userfaultfd": 282}),
}
EVERYWHERE = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
              "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "pidfd_getfd": 438,
              "mount_setattr": 442}
CLONE3, X32, AF_UNIX, EPERM, ENOSYS = 435, 0x40000000, 1, 1, 38
libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This machine does not let us make a sandbox."""


def call(what: str, result: int) -> int:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


# -- from outside to inside -------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Makes the new spaces; the first process in them does the rest."""
    plan, at = b"", b""
    while at != b"\n":
        at = os.read(0, 1)
        if not at:
            os._exit(1)
        plan += at
    told = json.loads(plan)
    os.set_inheritable(told["report"], False)
    os.umask(0o022)
    try:
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
        _leave()
        first = os.fork()
        if first == 0:
            inside(told)
        for fd in (0, 1, 2, told["report"]):
            os.close(fd)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0x7F)
    except Refused as exc:
        report(told, {"ended": "refused", "why": str(exc)})
    except OSError as exc:
        report(told, {"ended": "refused", "why": f"{exc.filename or 'fork'}: {exc.strerror}"})


def _leave() -> None:
    if os.geteuid() == 0:
        call("new namespaces", libc.unshare(SPACES))
        return
    user, group = os.geteuid(), os.getegid()
    call("a user namespace", libc.unshare(NEWUSER | SPACES))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {user} 1"), ("gid_map", f"{INSIDE} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def inside(plan: dict[str, Any]) -> NoReturn:
    """The first process: builds what is to be seen, gives up its rights, watches over the command."""
    try:
        user = _own_user()
        furnish(plan, user)
        drop(user)
        child = os.fork()
    except (Refused, OSError) as exc:
        why = str(exc) if isinstance(exc, Refused) else f"{exc.filename or 'fork'}: {exc.strerror}"
        report(plan, {"ended": "refused", "why": why})
    if child == 0:
        run(plan)
    for fd in (1, 2):
        os.close(fd)
    ended = watch(child, plan)
    finish(ended, plan)


def _own_user() -> int:
    """A user that nobody else is. Ours alone could be had without root: it is shown as another one inside."""
    if os.geteuid() != 0:
        return INSIDE
    wanted = OWN_USERS + os.getpid() + int(time.time() * 1000) % USERS
    with open("/proc/self/uid_map") as file:
        known = [tuple(map(int, line.split())) for line in file]
    return wanted if any(first <= wanted < first + many for first, _, many in known) else NOBODY


# -- what is to be seen -----------------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    call(f"mounting {source or kind} on {target}", libc.mount(
        source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags),
        data.encode() if data else None))


def read_only(path: str) -> None:
    """With everything that is mounted below it."""
    wanted = struct.pack("QQQQ", RDONLY | NOSUID | NODEV, 0, 0, 0)
    call(f"making {path} read-only", libc.syscall(
        ctypes.c_long(MOUNT_SETATTR), ctypes.c_int(PATH_FD), path.encode(), ctypes.c_uint(RECURSIVE), wanted,
        ctypes.c_size_t(len(wanted))))


def show(root: str, source: str, target: str) -> None:
    """A file or folder of the machine, read-only, at ``target``."""
    place = root + target
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        open(place, "a").close()
    mount(source, place, None, BIND | REC)
    read_only(place)


def furnish(plan: dict[str, Any], user: int) -> None:
    """A root of its own in memory, and into it."""
    root = plan["stage"]
    mount("none", "/", None, REC | PRIVATE)
    mount("sandbox", root, "tmpfs", NOSUID | NODEV, f"size={plan['disk']},nr_inodes={plan['files']},mode=755")
    for path in SYSTEM:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            show(root, path, path)
    for source, target in [*((p, p) for p in SETTINGS if os.path.exists(p)), *plan["shown"]]:
        show(root, source, target)
    for path in plan["hidden"]:
        if os.path.isdir(root + path):
            mount("hidden", root + path, "tmpfs", NOSUID | NODEV | NOEXEC | RDONLY, "size=0,mode=000")
    _devices(root)
    os.makedirs(root + "/etc", exist_ok=True)
    for name, text in (("passwd", f"builder:x:{user}:{user}::/tmp:/bin/sh\n"), ("group", f"builder:x:{user}:\n"),
                       ("hosts", "127.0.0.1 localhost\n")):
        with open(f"{root}/etc/{name}", "w") as file:
            file.write(text)
    os.mkdir(root + "/proc")
    mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC, "subset=pid")
    for path in ("/tmp", "/out", "/dev/shm"):
        os.mkdir(root + path, 0o700)
        os.chown(root + path, user, user)
    os.chdir(root)
    call("entering the new root", libc.pivot_root(b".", b"."))
    call("leaving the old root", libc.umount2(b".", DETACH))
    os.chdir("/tmp")
    libc.sethostname(b"sandbox", 7)


def _devices(root: str) -> None:
    os.makedirs(root + "/dev", exist_ok=True)
    for name in DEVICES:
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{root}/dev/{name}")


# -- rights -----------------------------------------------------------------------------------------------------------


def drop(user: int) -> None:
    """No user of the machine, no group, no capability, no key, no way to any of them."""
    known = CALLS.get(platform.machine())
    if known is None:
        raise Refused(f"no sandbox is known for {platform.machine()}")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        libc.syscall(ctypes.c_long(known[1]["keyctl"]), 1, None)  # a session keyring of its own
        os.setresuid(user, user, user)
    else:
        libc.syscall(ctypes.c_long(known[1]["keyctl"]), 1, None)
    libc.prctl(AMBIENT, CLEAR_ALL, 0, 0, 0)
    call("dropping capabilities", libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)))
    call("no new privileges", libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    call("not to be looked into", libc.prctl(DUMPABLE, 0, 0, 0, 0))
    _filter(*known)


def _filter(machine: int, numbers: dict[str, int]) -> None:
    """No socket but within the sandbox, and none of the calls that a build never needs and an attack does."""
    load, same, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, absent, kill = 0x7FFF0000, 0x50000 | EPERM, 0x50000 | ENOSYS, 0x80000000
    code = [(load, 0, 0, 4), (same, 1, 0, machine), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if platform.machine() == "x86_64":
        code += [(at_least, 0, 1, X32), (answer, 0, 0, deny)]
    code += [(same, 0, 1, CLONE3), (answer, 0, 0, absent)]  # its flags cannot be seen: libc takes clone instead
    for name, number in {**numbers, **EVERYWHERE}.items():
        if name not in ("socket", "clone"):
            code += [(same, 0, 1, number), (answer, 0, 0, deny)]
    code += [(same, 0, 4, numbers["socket"]), (load, 0, 0, 16), (same, 1, 0, AF_UNIX), (answer, 0, 0, deny),
             (answer, 0, 0, allow)]
    code += [(same, 0, 4, numbers["clone"]), (load, 0, 0, 16), (any_bit, 0, 1, NEWUSER), (answer, 0, 0, deny),
             (answer, 0, 0, allow), (answer, 0, 0, allow)]
    body = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(body)))
    call("filtering system calls", libc.prctl(SECCOMP, 2, program, 0, 0))


def run(plan: dict[str, Any]) -> NoReturn:
    """The command, in what is left of the first process."""
    try:
        for name, value in plan["limits"].items():
            what = getattr(resource, f"RLIMIT_{name}")
            ceiling = resource.getrlimit(what)[1]
            bound = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
            resource.setrlimit(what, (bound, bound))
        os.setsid()
        os.nice(10)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.execve(plan["command"][0], plan["command"], plan["env"])
    except OSError as exc:
        os.write(2, f"{plan['command'][0]}: {exc.strerror}\n".encode())
    os._exit(127)


# -- watching, and the end --------------------------------------------------------------------------------------------


def watch(child: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Returns how it ended: by itself (``code``), or over which limit."""
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    until = time.monotonic() + plan["wall_s"]
    while True:
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == child:
                    return {"ended": "itself", "code": os.waitstatus_to_exitcode(found[1])}
        if over := _over(plan):
            return {"ended": over}
        if time.monotonic() > until:
            return {"ended": "time"}
        ready = select.select([0, wake], [], [], LOOK_S)[0]
        if 0 in ready and not os.read(0, 4096):
            os._exit(1)  # the builder is gone, and with us all that runs here
        if wake in ready:
            os.read(wake, 4096)


def _over(plan: dict[str, Any]) -> str:
    memory, threads = 0, 1  # ourselves: the kernel counts us, too
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/status") as file:
                said = dict(line.split(":", 1) for line in file if line.startswith(("Rss", "Threads")))
        except OSError:
            continue  # it has just ended
        memory += sum(int(said.get(key, "0 kB").split()[0]) << 10 for key in ("RssAnon", "RssShmem"))
        threads += int(said.get("Threads", "0"))
    if memory > plan["memory"]:
        return "memory"
    if threads >= plan["limits"]["NPROC"]:
        return "processes"
    room = os.statvfs("/tmp")
    return "disk" if room.f_bavail < room.f_blocks // 256 or room.f_favail < 16 else ""


def finish(ended: dict[str, Any], plan: dict[str, Any]) -> NoReturn:
    """Kills all that is left inside, then hands out the files of ``/out``."""
    with suppress(OSError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    files: list[tuple[str, int, int]] = []
    with suppress(OSError):
        folder = os.open("/out", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        for name in sorted(os.listdir(folder))[:plan["results"]]:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            about = os.fstat(fd)
            if stat.S_ISREG(about.st_mode):
                files.append((name, about.st_size, fd))
    report(plan, {**ended, "files": [(name, size) for name, size, _ in files]}, files)


def report(plan: dict[str, Any], said: dict[str, Any], files: Sequence[tuple[str, int, int]] = ()) -> NoReturn:
    try:
        with os.fdopen(plan["report"], "wb") as out:
            out.write(json.dumps(said).encode() + b"\n")
            for _, size, fd in files:
                left = size
                while left and (chunk := os.read(fd, min(left, 1 << 20))):
                    out.write(chunk)
                    left -= len(chunk)
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
