"""`overlayfs-py --doctor`: what this machine offers, what a mount would use, and what would make it faster."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import stat
import sys
from collections.abc import Iterator

from overlayfs_py.engines import machine
from overlayfs_py.sys import credentials

_ADVICE = "    -> "
_PAGES = 256  # of one request, the most that the engines ask for
_RANGE = "100000-165535"
# The default of the kernel. A look-up of a missing name over /dev/fuse took 13 microseconds with it, and 30 without.
_HALT_POLLING = 200_000


def examine() -> tuple[str, bool]:
    """The report, in lines, and whether a mount by this process would work. Changes nothing."""
    device = machine.obstacle_to_device()
    unmountable = _obstacle_to_mounting()
    native = machine.obstacle_to_native()
    portable = machine.obstacle_to_portable() if native else None
    transport = _transport() if native is None else ("/dev/fuse", None, "")
    lines = [*_kernel(), *_device(device), *_mounting(unmountable), *_engine(native, portable)]
    lines += [*_uring(native, transport), *_idling(), *_passthrough(), *_requests(), *_users()]
    reasons = [f"{machine.DEVICE}: {device}"] if device else []
    reasons += [unmountable] if unmountable else []
    reasons += [f"no engine: {portable}"] if portable else []
    if reasons:
        lines.append(_line("result", f"no mount would work: {'; '.join(reasons)}"))
    else:
        engine = "portable" if native else "native"
        lines.append(_line("result", f"a mount would work: the {engine} engine over {transport[0]}"))
    return "\n".join(lines), not reasons


def _line(what: str, text: str) -> str:
    return f"{what:<16}{text}"


def _kernel() -> Iterator[str]:
    running = machine.release()
    yield _line("kernel", f"Linux {os.uname().release}")
    has = [name for name, first in machine.FEATURES.items() if running >= first]
    yield _line("FUSE", ", ".join(has) or "nothing that came after Linux 5.4")
    for name, (major, minor) in machine.FEATURES.items():
        if running < (major, minor):
            yield _line("", f"not {name}: since Linux {major}.{minor}")


def _device(obstacle: str | None) -> Iterator[str]:
    yield _line(machine.DEVICE, obstacle or "usable")
    if obstacle == os.strerror(errno.EACCES):
        yield f"{_ADVICE}chmod 666 {machine.DEVICE}, as root of the machine"
    elif obstacle:
        yield f"{_ADVICE}modprobe fuse; in a container: start it with --device {machine.DEVICE}"


def _fusermount() -> str | None:
    """The set-user-ID program that mounts for users, where it would be root."""
    found = shutil.which("fusermount3") or shutil.which("fusermount")
    if found is None:
        return None
    st = os.stat(found)
    return found if st.st_mode & stat.S_ISUID and st.st_uid == 0 and machine.may_gain_privilege() else None


def _obstacle_to_mounting() -> str | None:
    if not machine.owns_mounts():
        return "this user namespace may not mount in its mount namespace, which is another one's"
    if not machine.may_mount() and _fusermount() is None:
        return "mounting takes CAP_SYS_ADMIN, or fusermount3 with its set-user-ID bit"
    return None


def _mounting(obstacle: str | None) -> Iterator[str]:
    if obstacle is None:
        yield _line("mounting", "allowed" if machine.may_mount() else f"through {_fusermount()}")
        return
    yield _line("mounting", obstacle)
    if not machine.owns_mounts():
        yield f"{_ADVICE}unshare --user --map-root-user --mount"
    else:
        yield f"{_ADVICE}apt-get install fuse3; in a container: start it with --cap-add SYS_ADMIN"


def _engine(native: str | None, portable: str | None) -> Iterator[str]:
    if native is None:
        yield _line("engine", "native")
        return
    yield _line("engine", "none" if portable else "portable")
    yield _line("", f"not native: {native}")
    if portable:
        yield _line("", f"not portable: {portable}")
        yield f"{_ADVICE}{sys.executable} -m pip install pyfuse3 trio"
    if os.geteuid() != 0:
        yield f"{_ADVICE}unshare --user --map-root-user --mount"
    elif machine.release() >= machine.OLDEST and machine.may_open_everything():
        yield f"{_ADVICE}apt-get install gcc python3-dev, then install overlayfs-py once more (README, Use)"


def _transport() -> tuple[str, str | None, str]:
    """What requests would come over, why not io_uring, and the command that changes this."""
    from overlayfs_py.engines import native

    obstacle = native.obstacle_to_rings()
    if obstacle is not None:
        fix = "sysctl kernel.io_uring_disabled=0" if machine.uring_sysctl() else ""
        return "/dev/fuse", obstacle, fix
    if machine.uring_switch():
        return "io_uring", None, ""
    return "/dev/fuse", "it is not switched on", f"echo Y > {machine.URING_SWITCH}"


def _uring(native: str | None, transport: tuple[str, str | None, str]) -> Iterator[str]:
    switch = {True: "Y", False: "N", None: "missing"}[machine.uring_switch()]
    yield _line("io_uring switch", f"{switch} ({machine.URING_SWITCH})")
    sysctl = machine.uring_sysctl()
    if sysctl is not None:
        yield _line("io_uring sysctl", f"kernel.io_uring_disabled={sysctl}")
    chosen, why, fix = transport
    if native is not None:
        yield _line("transport", f"{chosen}: only the native engine has io_uring")
        return
    yield _line("transport", f"{chosen}: {why}" if why else chosen)
    if fix:
        yield f"{_ADVICE}{fix}{_as_root()}"


def _idling() -> Iterator[str]:
    """Whether a request has to wait until a halted processor runs again, which takes long in a virtual machine."""
    polling = machine.halt_polling()
    if polling is None:
        return
    halting = f"wait {polling / 1000:g} µs before they halt" if polling else "halt at once"
    latency = machine.open_latency("auto")
    if latency >= 0:
        os.close(latency)
        halting += ", but stay awake while a mount is busy (cpu_latency)"
    yield _line("idle processors", halting)
    if polling < _HALT_POLLING and latency < 0:
        yield f"{_ADVICE}echo {_HALT_POLLING} > {machine.HALT_POLLING}{_as_root()}"


def _as_root() -> str:
    inside = os.geteuid() != 0 or not credentials.in_initial_user_namespace()
    return "   (as root of the machine)" if inside else ""


def _passthrough() -> Iterator[str]:
    if machine.may_pass_through():
        yield _line("passthrough", "allowed")
    elif machine.release() < machine.OLDEST_WITH_PASSTHROUGH:
        yield _line("passthrough", "the kernel is too old")
    else:
        yield _line("passthrough", "takes CAP_SYS_ADMIN as root of the machine")


def _requests() -> Iterator[str]:
    pages = machine.most_pages()
    if pages is None:
        yield _line("requests", f"{_PAGES} pages at most")
        return
    yield _line("requests", f"{min(pages, _PAGES)} pages at most (fs.fuse.max_pages_limit={pages})")
    if pages < _PAGES:
        yield f"{_ADVICE}sysctl fs.fuse.max_pages_limit={_PAGES}{_as_root()}"


def _users() -> Iterator[str]:
    """What containers without root take."""
    setting = machine.obstacle_to_user_namespaces()
    yield _line("user namespaces", f"not for users: {setting[0]}" if setting else "allowed")
    if setting:
        yield f"{_ADVICE}{setting[1]}{_as_root()}"
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    uids, gids = (machine.subordinate_ids(table, name, uid) for table in ("/etc/subuid", "/etc/subgid"))
    yield _line("subordinate ids", f"{uids} users, {gids} groups for {name}")
    if uid != 0 and not (uids and gids):
        yield f"{_ADVICE}usermod --add-subuids {_RANGE} --add-subgids {_RANGE} {name}{_as_root()}"
