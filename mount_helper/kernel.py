"""FUSE mounts by mount(2), which takes CAP_SYS_ADMIN in the user namespace of the mount namespace; fuse(4)."""

from __future__ import annotations

import ctypes
import errno
import os

from mount_helper.request import SUBTYPE, HelperError, Request, show

DEVICE = b"/dev/fuse"

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_LIBC = ctypes.CDLL(None, use_errno=True)


def open_device() -> int:
    """A descriptor of /dev/fuse, not mounted yet. Raises OSError."""
    return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)


def mount(request: Request, device: int) -> None:
    """Mount what `device` will serve. Raises OSError, EPERM where the caller may not mount at all."""
    options = [b"fd=%d,rootmode=40000,user_id=%d,group_id=%d" % (device, os.getuid(), os.getgid())]
    options += request.fuse_options()
    if request.context is not None:
        options.append(b'context="%s"' % request.context)
    target = request.mountpoint
    _call(
        _LIBC.mount(request.source, target, b"fuse." + SUBTYPE, ctypes.c_ulong(request.flags), b",".join(options)),
        target,
    )


def unmount(mountpoint: bytes, flags: int) -> None:
    """umount2(2), never through a symbolic link. Raises OSError."""
    _call(_LIBC.umount2(mountpoint, flags | UMOUNT_NOFOLLOW), mountpoint)


def topmost(mountpoint: bytes) -> bytes | None:
    """The `major:minor` of the topmost mount on a path free of symbolic links, or None; it sends the mount no request.

    See proc_pid_mountinfo(5). Raises HelperError where /proc is not mounted.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            lines = table.read().splitlines()
    except FileNotFoundError as error:
        raise HelperError("cannot read /proc/self/mountinfo; mount /proc") from error
    for line in reversed(lines):
        fields = line.split(b" ", 5)
        if _unescape(fields[4]) == mountpoint:
            return fields[2]
    return None


def _unescape(field: bytes) -> bytes:
    """A path as the table of mounts has it, where `\\ooo` stands for the byte of that octal number."""
    first, *pieces = field.split(b"\\")
    return first + b"".join(bytes((int(piece[:3], 8),)) + piece[3:] for piece in pieces)


def explain(error: OSError, mountpoint: bytes) -> HelperError:
    """What a failure of `open_device` or `mount` means to the user."""
    if error.filename == DEVICE:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return HelperError("the kernel offers no /dev/fuse; load its module with 'modprobe fuse'")
        return HelperError(f"cannot open /dev/fuse: {error.strerror}")
    if error.errno == errno.ENODEV:
        return HelperError("the kernel has no FUSE filesystem; load its module with 'modprobe fuse'")
    return HelperError(f"cannot mount on {show(mountpoint)}: {error.strerror}")


def _call(result: int, path: bytes) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
