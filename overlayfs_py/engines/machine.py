"""What this machine offers to a FUSE mount: look-ups that change nothing.

Beside the native engine rather than in it, as it also says why that one can't be loaded.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from overlayfs_py.sys import credentials

DEVICE = "/dev/fuse"
URING_SWITCH = "/sys/module/fuse/parameters/enable_uring"
HALT_POLLING = "/sys/module/haltpoll/parameters/guest_halt_poll_ns"
IDLE_DRIVER = "/sys/devices/system/cpu/cpuidle/current_driver"
CPU_LATENCY = "/dev/cpu_dma_latency"

MOST_PROCESSORS_AWAKE = 16
"""On a larger machine most processors would look for work in vain."""

OLDEST = (5, 4)
"""The first Linux whose FUSE protocol, 7.31, the native engine can speak."""
OLDEST_WITH_PASSTHROUGH = (6, 9)
OLDEST_WITH_URING = (6, 14)

FEATURES = {
    "set-user-ID bits dropped by the kernel": (5, 11),
    "files without a name": (6, 1),
    "passthrough": OLDEST_WITH_PASSTHROUGH,
    "io_uring": OLDEST_WITH_URING,
    "copies beyond 4 GiB at once": (6, 18),
}
"""What FUSE has learnt since, by Linux release; the protocol's changes in include/uapi/linux/fuse.h."""

_USER_NAMESPACE_SETTINGS = (
    ("user/max_user_namespaces", 10000, 0),
    # Debian's and Ubuntu's own.
    ("kernel/unprivileged_userns_clone", 1, 0),
    ("kernel/apparmor_restrict_unprivileged_userns", 0, 1),
)
_DEVICE_NUMBER = os.makedev(10, 229)
_NS_GET_USERNS = 0xB701  # ioctl_nsfs(2)


def release() -> tuple[int, int]:
    """The running kernel's version, as in (6, 18)."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.partition("-")[0])


def obstacle_to_native() -> str | None:
    """Why the native engine can't serve here, or None; the engine is loaded to find out."""
    if release() < OLDEST:
        return f"Linux {os.uname().release} is older than {OLDEST[0]}.{OLDEST[1]}"
    if not may_open_everything():
        return "it needs root, at least of a user namespace, with CAP_DAC_OVERRIDE"
    try:
        from overlayfs_py.engines import native  # noqa: F401
    except ImportError as error:
        return f"it is not built ({error})"
    return None


def obstacle_to_portable() -> str | None:
    """Why the portable engine can't be loaded, which is tried, or None."""
    try:
        from overlayfs_py.engines import portable  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def may_open_everything() -> bool:
    """Whether this process may open any file of its layers again, as each request without a handle may have to."""
    return os.geteuid() == 0 and credentials.has_capability(credentials.CAP_DAC_OVERRIDE)


def uring_sysctl() -> int | None:
    """kernel.io_uring_disabled: 0 nobody, 1 all without CAP_SYS_ADMIN and outside a group, 2 all; None before 6.6."""
    return _number("/proc/sys/kernel/io_uring_disabled")


def uring_switch() -> bool | None:
    """Whether the kernel offers FUSE over io_uring; None where it has no such switch, or its module is not loaded."""
    try:
        with open(URING_SWITCH, "rb") as switch:
            return switch.read().strip() == b"Y"
    except FileNotFoundError:
        return None


def obstacle_to_rings(error: OSError) -> str:
    """What it means that the kernel made no ring; io_uring_setup(2)."""
    if error.errno == errno.EPERM:
        forbidden = uring_sysctl()
        if forbidden:
            return f"kernel.io_uring_disabled is {forbidden}"
        return "io_uring is forbidden to this process, as container engines do"
    if error.errno == errno.ENOSYS:
        return "the kernel has no io_uring, or hides it from this process"
    return f"the kernel makes no ring: {error.strerror}"


def halt_polling() -> int | None:
    """How long an idle processor of this virtual machine looks for work before it halts, in nanoseconds.

    None without the driver that does so (Documentation/virt/guest-halt-polling.rst).
    """
    return _number(HALT_POLLING)


def open_latency(wanted: str) -> int:
    """A descriptor through which to say how long a processor may take to wake; -1 where that isn't to be said.

    `wanted` is the option cpu_latency; auto: only on a small virtual machine whose processors halt when they are idle,
    and where it can be done. Raises OSError for what keeps `on` from it (Documentation/power/pm_qos_interface.rst).
    """
    if wanted == "off" or (wanted == "auto" and not _halts()):
        return -1
    try:
        return os.open(CPU_LATENCY, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        if wanted == "on":
            raise
        # not root, in a container without the device, or whatever else: it only makes a mount faster
        return -1


def _halts() -> bool:
    """Whether idle processors are halted by the driver for virtual machines, and are few."""
    try:
        with open(IDLE_DRIVER, "rb") as driver:
            return driver.read() == b"haltpoll\n" and (os.cpu_count() or 1) <= MOST_PROCESSORS_AWAKE
    except FileNotFoundError:
        return False


def obstacle_to_device() -> str | None:
    """Why /dev/fuse can't be opened, or None. Opening it has the kernel load its module."""
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _DEVICE_NUMBER:
        return "not the device of FUSE, character device 10:229"
    return None


def owns_mounts() -> bool:
    """Whether the mount namespace is of this process's user namespace, or one below it; else nobody here may mount.

    Source: mount_namespaces(7), ioctl_nsfs(2).
    """
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.ioctl(namespace, _NS_GET_USERNS))
    except PermissionError:
        return False
    finally:
        os.close(namespace)
    return True


def may_mount() -> bool:
    """Whether mount(2) is allowed."""
    return owns_mounts() and credentials.has_capability(credentials.CAP_SYS_ADMIN)


def may_gain_privilege() -> bool:
    """Whether set-user-ID programs work; PR_SET_NO_NEW_PRIVS(2const)."""
    with open("/proc/self/status", "rb") as status:
        return b"NoNewPrivs:\t1\n" not in status.readlines()


def may_pass_through() -> bool:
    """Whether the kernel lets this process hand files to it (FUSE_PASSTHROUGH)."""
    privileged = credentials.has_capability(credentials.CAP_SYS_ADMIN) and credentials.in_initial_user_namespace()
    return privileged and release() >= OLDEST_WITH_PASSTHROUGH


def most_pages() -> int | None:
    """Pages of data that one request may carry; None where this can't be told (before Linux 6.13)."""
    return _number("/proc/sys/fs/fuse/max_pages_limit")


def obstacle_to_user_namespaces() -> tuple[str, str] | None:
    """The setting that keeps users from making user namespaces, and what it is to be; None where they may."""
    for path, wanted, forbids in _USER_NAMESPACE_SETTINGS:
        found = _number(f"/proc/sys/{path}")
        if found == forbids:
            return f"{path.replace('/', '.')}={found}", f"sysctl {path.replace('/', '.')}={wanted}"
    return None


def subordinate_ids(table: str, user: str, uid: int) -> int:
    """How many ids `table`, as /etc/subuid, gives to a user; subuid(5)."""
    try:
        with open(table, encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.strip().split(":") for line in file]
    except FileNotFoundError:
        return 0
    return sum(int(row[2]) for row in rows if len(row) == 3 and row[0] in (user, str(uid)))


def _number(path: str) -> int | None:
    try:
        with open(path, "rb") as file:
            return int(file.read())
    except FileNotFoundError:
        return None
