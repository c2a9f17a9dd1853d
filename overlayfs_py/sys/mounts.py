"""Private copies of mounts, which only their descriptor leads to."""

import ctypes
import os

from overlayfs_py.sys.libc import AT_EMPTY_PATH, LIBC, last_error
from overlayfs_py.sys.paths import fd_path

_SYS_OPEN_TREE = 428
_SYS_MOUNT_SETATTR = 442
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 0x01
_MOUNT_ATTR__ATIME = 0x70
_MOUNT_ATTR_NOATIME = 0x10
_MOUNT_ATTR_STRICTATIME = 0x20
_MOUNT_ATTR_NODIRATIME = 0x80
_MS_NOATIME = 1 << 10
_MS_NODIRATIME = 1 << 11
_MS_STRICTATIME = 1 << 24


class _MountAttr(ctypes.Structure):
    """struct mount_attr, linux/mount.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


_syscall = LIBC.syscall


def clone_mount(fd: int, *, read_only: bool, flags: int) -> int:
    """A copy of the mount that the directory `fd` is on, with that directory as its root and nothing mounted in it.

    Of the MS_* `flags` of mount(2) those that say when access times are set count; without any it is as the mount.
    Returns an O_PATH descriptor of the root, close-on-exec; the copy goes when that and all opened below it is closed.
    Raises EPERM without CAP_SYS_ADMIN in the mount namespace, or where the mount's flags are locked; EINVAL
    where mounts below are locked or the mount is not in this namespace; ENOSYS before Linux 5.12.
    Source: open_tree(2), mount_setattr(2).
    """
    clone: int = _syscall(
        ctypes.c_long(_SYS_OPEN_TREE), fd, ctypes.c_char_p(b""), AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC
    )
    if clone < 0:
        raise last_error()
    wanted = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY if read_only else 0)
    if flags & _MS_NOATIME:
        wanted.attr_set |= _MOUNT_ATTR_NOATIME | _MOUNT_ATTR_NODIRATIME
        wanted.attr_clr = _MOUNT_ATTR__ATIME
    elif flags & _MS_STRICTATIME:
        wanted.attr_set |= _MOUNT_ATTR_STRICTATIME
        wanted.attr_clr = _MOUNT_ATTR__ATIME
    if flags & _MS_NODIRATIME:
        wanted.attr_set |= _MOUNT_ATTR_NODIRATIME
    result: int = _syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        clone,
        ctypes.c_char_p(b""),
        AT_EMPTY_PATH,
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )
    if result < 0:
        error = last_error()
        os.close(clone)
        raise error
    return clone


def mount_id(fd: int) -> int:
    """The id of the mount that `fd` is on, unique among those there are now (proc(5), /proc/PID/fdinfo)."""
    with open(fd_path(fd).replace(b"/fd/", b"/fdinfo/"), "rb") as info:
        for line in info:
            if line.startswith(b"mnt_id:"):
                return int(line.split()[1])
    raise AssertionError("fdinfo without mnt_id")
