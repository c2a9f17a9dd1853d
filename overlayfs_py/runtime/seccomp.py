"""Which system calls a container may make: the default profile, and profiles that a file has.

The default names what is allowed. What it does not name is refused as a call that the kernel does not have, so that
programs fall back to older ones, and what it names as refused, as one that is not permitted. Which calls wait for a
capability follows capabilities(7); the rest of those refused are not confined to a namespace, or have a history of
letting containers out. Source: seccomp(2), the OCI runtime specification, config-linux.md.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from overlayfs_py.runtime.errors import ContainerError

_ALLOWED = """
    _llseek _newselect accept accept4 access adjtimex alarm arch_prctl arm_fadvise64_64 arm_sync_file_range bind
    breakpoint brk cacheflush cachestat capget capset chdir chmod chown chown32 clock_adjtime clock_adjtime64
    clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 close
    close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old
    epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit exit_group
    faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown
    fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat
    fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait
    futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid
    getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp
    getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid
    getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch
    inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents
    io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule
    landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount
    listxattr listxattrat llistxattr llseek lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules
    lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod
    mknodat mlock mlock2 mlockall mmap mmap2 modify_ldt mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
    mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd
    msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat nice open openat openat2 pause
    pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl
    pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2
    read readahead readdir readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg
    remap_file_pages removexattr removexattrat rename renameat renameat2 restart_syscall riscv_flush_icache
    riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield
    seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg
    sendto set_robust_list set_thread_area set_tid_address set_tls setfsgid setfsgid32 setfsuid setfsuid32
    setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid
    setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr
    setxattrat shmat shmctl shmdt shmget shutdown sigaction sigaltstack signal signalfd signalfd4 sigpending
    sigprocmask sigreturn sigsuspend socketcall socketpair splice stat stat64 statfs statfs64 statmount statx
    symlink symlinkat sync sync_file_range sync_file_range2 syncfs sysinfo tee tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
    timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64
    ugetrlimit umask uname unlink unlinkat utime utimensat utimensat_time64 utimes vfork wait4 waitid
    waitpid write writev
""".split()

_WITH_CAPABILITY = {
    "BPF": "bpf",
    "DAC_READ_SEARCH": "open_by_handle_at",
    "PERFMON": "perf_event_open",
    "SYSLOG": "syslog",
    "SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_set_self_attr mount
        mount_setattr move_mount open_tree perf_event_open pivot_root quotactl quotactl_fd setdomainname sethostname
        setns swapoff swapon syslog umount umount2 unshare
    """,
    "SYS_BOOT": "reboot",
    "SYS_CHROOT": "chroot",
    "SYS_MODULE": "delete_module finit_module init_module",
    "SYS_NICE": "get_mempolicy mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node",
    "SYS_PACCT": "acct",
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev",
    "SYS_RAWIO": "ioperm iopl",
    "SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "SYS_TTY_CONFIG": "vhangup",
}

_REFUSED = """
    add_key io_uring_enter io_uring_register io_uring_setup kexec_file_load kexec_load keyctl request_key userfaultfd
    vmsplice
""".split()

_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW flag but CLONE_NEWTIME, which clone(2) does not take
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""PER_LINUX and PER_LINUX32, with and without UNAME26, and the question; personality(2)."""
_AF_VSOCK = 40

# The machine's name, as uname(2) has it: that in profiles of Docker's, and the ABIs that programs of it have. Each ABI
# costs the start of a container some milliseconds; x32 is used by none.
_MACHINES = {
    "x86_64": ("amd64", ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86")),
    "aarch64": ("arm64", ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM")),
    "s390x": ("s390x", ("SCMP_ARCH_S390X", "SCMP_ARCH_S390")),
    "ppc64le": ("ppc64le", ("SCMP_ARCH_PPC64LE",)),
    "riscv64": ("riscv64", ("SCMP_ARCH_RISCV64",)),
}


def default(capabilities: Collection[str]) -> dict[str, Any]:
    """The `seccomp` member for a container whose root has these capabilities, named without CAP_."""
    allowed = set(_ALLOWED)
    refused = set(_REFUSED)
    for capability, calls in _WITH_CAPABILITY.items():
        (allowed if capability in capabilities else refused).update(calls.split())
    refused -= allowed
    rules = [
        _rule(allowed),
        *(_rule(("personality",), _argument(0, value, "SCMP_CMP_EQ")) for value in _PERSONALITIES),
        _rule(("socket",), _argument(0, _AF_VSOCK, "SCMP_CMP_NE")),
    ]
    if "clone" in refused:
        # Its flags come second there; clone(2). Those of clone3 can't be looked at, so it is as if it were not there.
        number = 1 if os.uname().machine == "s390x" else 0
        rules.append(_rule(("clone",), _argument(number, _NEW_NAMESPACES, "SCMP_CMP_MASKED_EQ")))
        refused -= {"clone", "clone3"}
    rules.append({"names": sorted(refused), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM})
    profile: dict[str, Any] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "syscalls": rules,
    }
    if os.uname().machine in _MACHINES:
        profile["architectures"] = list(_MACHINES[os.uname().machine][1])
    return profile


def _rule(names: Collection[str], *arguments: Mapping[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": sorted(names), "action": "SCMP_ACT_ALLOW"}
    if arguments:
        rule["args"] = list(arguments)
    return rule


def _argument(number: int, value: int, comparison: str) -> dict[str, Any]:
    if comparison == "SCMP_CMP_MASKED_EQ":
        return {"index": number, "value": value, "valueTwo": 0, "op": comparison}
    return {"index": number, "value": value, "op": comparison}


def read(path: str) -> str:
    """The text of a profile, after a look that it is one. Raises ContainerError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        parsed = json.loads(text)
    except OSError as error:
        raise ContainerError(f"cannot read the seccomp profile {path}: {error.strerror}") from error
    except ValueError as error:
        raise ContainerError(f"the seccomp profile {path} is no JSON: {error}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("defaultAction"), str):
        raise ContainerError(f"{path} is no seccomp profile: it has no defaultAction")
    return text


def chosen(text: str, capabilities: Collection[str]) -> dict[str, Any]:
    """The `seccomp` member that a profile of Docker's kind, or an OCI runtime's, means for these capabilities."""
    given = json.loads(text)
    profile = {key: value for key, value in given.items() if key in _MEMBERS}
    machine = os.uname().machine
    ours, abis = _MACHINES.get(machine, (machine, ()))
    if "architectures" not in given and abis:
        wanted = [entry for entry in given.get("archMap") or () if entry.get("architecture") == abis[0]]
        profile["architectures"] = [abis[0], *(wanted[0].get("subArchitectures") or () if wanted else abis[1:])]
    profile["syscalls"] = [
        {key: value for key, value in rule.items() if key in _RULE_MEMBERS and value is not None}
        for rule in given.get("syscalls") or ()
        if _applies(rule, ours, capabilities)
    ]
    return profile


_MEMBERS = ("defaultAction", "defaultErrnoRet", "architectures", "flags", "listenerPath", "listenerMetadata")
_RULE_MEMBERS = ("names", "action", "errnoRet", "args")


def _applies(rule: Mapping[str, Any], machine: str, capabilities: Collection[str]) -> bool:
    with_, without = rule.get("includes") or {}, rule.get("excludes") or {}
    has = {f"CAP_{name}" for name in capabilities}
    return (
        set(with_.get("caps") or ()) <= has
        and (not with_.get("arches") or machine in with_["arches"])
        and ("minKernel" not in with_ or _version(os.uname().release) >= _version(with_["minKernel"]))
        and not has & set(without.get("caps") or ())
        and machine not in (without.get("arches") or ())
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
