"""Writes ``seccomp.json``, the system calls of the image builder's container: ``python infra/compose/seccomp.py``.

Docker's own profile lets nobody make namespaces, which the build sandbox is made of. This one does, and refuses what no
service of ours needs and an attack on the kernel does. The container has no capability and can get none besides, and
what the sandbox runs has a filter of its own, which refuses namespaces as well.
"""

from __future__ import annotations

import json
from pathlib import Path

REFUSED = {
    "kernel and machine": "acct bpf create_module delete_module finit_module get_kernel_syms init_module ioperm iopl "
                          "kexec_file_load kexec_load lookup_dcookie nfsservctl perf_event_open query_module quotactl "
                          "quotactl_fd reboot swapoff swapon syslog sysfs _sysctl uselib ustat vhangup vm86 vm86old",
    "clocks": "adjtimex clock_adjtime clock_adjtime64 clock_settime clock_settime64 settimeofday stime",
    "keys": "add_key keyctl request_key",
    "other processes": "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace setns",
    "files past their paths": "fanotify_init fsconfig fsmount fsopen fspick move_mount name_to_handle_at "
                              "open_by_handle_at open_tree",
    "where faults were found": "get_mempolicy io_uring_enter io_uring_register io_uring_setup mbind modify_ldt "
                               "move_pages set_mempolicy userfaultfd",
}
EPERM, AF_VSOCK = 1, 40


def profile() -> dict[str, object]:
    """As the engine reads it. A name that a machine's table does not hold is passed over there."""
    rules = [{"names": calls.split(), "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM, "comment": why}
             for why, calls in REFUSED.items()]
    vsock = {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM, "comment": "the way to a hypervisor",
             "args": [{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_EQ"}]}
    names = [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
             {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}]
    return {"defaultAction": "SCMP_ACT_ALLOW", "archMap": names, "syscalls": [*rules, vsock]}


if __name__ == "__main__":
    Path(__file__).with_name("seccomp.json").write_text(json.dumps(profile(), indent=1) + "\n")
