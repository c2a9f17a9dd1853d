"""FUSE mounts by mount(2) or fsmount(2), which take CAP_SYS_ADMIN in the namespace of the mounts; fuse(4)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from mount_helper.request import SUBTYPE, HelperError, Request, show

DEVICE = b"/dev/fuse"

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# The numbers are the same on every architecture but alpha.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 429, 430, 431, 432
_CLOEXEC = 1  # of fsopen(2) and fsmount(2)
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_BENEATH = 0x200
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
# struct statx: the device is at its end.
_STATX_BYTES, _STATX_DEVICE_AT = 256, 136
_device = struct.Struct("=II")

# What the MS_* flags of mount(2) are for a filesystem, and MOUNT_ATTR_* for a mount.
_FILESYSTEM_FLAGS = {1: b"ro", 1 << 4: b"sync", 1 << 7: b"dirsync", 1 << 25: b"lazytime"}
_MOUNT_ATTRIBUTES = {
    1: 0x01,  # read-only
    1 << 1: 0x02,  # nosuid
    1 << 2: 0x04,  # nodev
    1 << 3: 0x08,  # noexec
    1 << 8: 0x200000,  # nosymfollow
    1 << 10: 0x10,  # noatime
    1 << 11: 0x80,  # nodiratime
    1 << 24: 0x20,  # strictatime
}

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
    _checked(
        _LIBC.mount(request.source, target, b"fuse." + SUBTYPE, ctypes.c_ulong(request.flags), b",".join(options)),
        target,
    )


def unmount(mountpoint: bytes, flags: int) -> None:
    """umount2(2), never through a symbolic link. Raises OSError."""
    _checked(_LIBC.umount2(mountpoint, flags | UMOUNT_NOFOLLOW), mountpoint)


def mount_aside(request: Request, device: int) -> int:
    """As mount, but to no place: an O_PATH descriptor of the root, with which the mount goes unless `attach` is called.

    `MS_POSIXACL` is left out, for which there is no word. Raises OSError, ENOSYS before Linux 5.2. Source: fsopen(2),
    fsconfig(2), fsmount(2).
    """
    context = _checked(_LIBC.syscall(ctypes.c_long(_SYS_FSOPEN), ctypes.c_char_p(b"fuse"), ctypes.c_uint(_CLOEXEC)))
    try:
        for key, value in (
            (b"source", request.source),
            (b"subtype", SUBTYPE),
            (b"fd", b"%d" % device),
            (b"rootmode", b"40000"),
            (b"user_id", b"%d" % os.getuid()),
            (b"group_id", b"%d" % os.getgid()),
            (b"context", request.context),
        ):
            if value is not None:
                _configure(context, _FSCONFIG_SET_STRING, key, value)
        words = [word for flag, word in _FILESYSTEM_FLAGS.items() if request.flags & flag]
        for word in (*request.fuse_options(), *words):
            _configure(context, _FSCONFIG_SET_FLAG, word, None)
        _configure(context, _FSCONFIG_CMD_CREATE, None, None)
        attributes = sum(attribute for flag, attribute in _MOUNT_ATTRIBUTES.items() if request.flags & flag)
        arguments = (context, ctypes.c_uint(_CLOEXEC), ctypes.c_uint(attributes))
        return _checked(_LIBC.syscall(ctypes.c_long(_SYS_FSMOUNT), *arguments))
    finally:
        os.close(context)


def _configure(context: int, command: int, key: bytes | None, value: bytes | None) -> None:
    arguments = (context, ctypes.c_uint(command), ctypes.c_char_p(key), ctypes.c_char_p(value), ctypes.c_int(0))
    _checked(_LIBC.syscall(ctypes.c_long(_SYS_FSCONFIG), *arguments))


def is_confined() -> bool:
    """Whether AppArmor holds this process to a profile. Many allow mount(2) of FUSE and know no move_mount(2)."""
    try:
        with open("/proc/self/attr/apparmor/current", "rb") as profile:
            return not profile.read().startswith(b"unconfined")
    except OSError:
        # No AppArmor says ENOENT, and EINVAL where another module answers.
        return False


def attach(root: int, name: bytes, mountpoint: bytes) -> bool:
    """Show at `mountpoint` what the mount that was made aside has under `name` in its root; the same flags hold.

    Where that can't be done, it is the root that is shown: whether it is not. Raises OSError where nothing is mounted.
    Source: open_tree(2), move_mount(2).
    """
    tree = _open_tree(root, name)
    if tree >= 0:
        try:
            _move_mount(tree, mountpoint, 0)
        finally:
            os.close(tree)
        return True
    # Before Linux 6.15 only what is mounted somewhere can be shown elsewhere, too.
    _move_mount(root, mountpoint, 0)
    tree = _open_tree(root, name)
    if tree < 0:
        return False
    try:
        _move_mount(tree, mountpoint, _MOVE_MOUNT_BENEATH)
    except OSError:
        # Whatever it is, as EINVAL before Linux 6.5: the root is mounted, and serves as well.
        return False
    finally:
        os.close(tree)
    if topmost(mountpoint) == device_of(root):
        unmount(mountpoint, MNT_DETACH)
    return True


def _open_tree(root: int, name: bytes) -> int:
    """A mount of its own of a directory, or -1 where there can be none: not everywhere is it possible or allowed."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
    found: int = _LIBC.syscall(ctypes.c_long(_SYS_OPEN_TREE), root, ctypes.c_char_p(name), flags)
    return found


def _move_mount(fd: int, mountpoint: bytes, how: int) -> None:
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | how)
    to = (ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(mountpoint))
    _checked(_LIBC.syscall(ctypes.c_long(_SYS_MOVE_MOUNT), fd, ctypes.c_char_p(b""), *to, flags))


def device_of(root: int) -> bytes:
    """The `major:minor` of the mount that an open directory is on; it sends the mount no request."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    _checked(_LIBC.statx(root, ctypes.c_char_p(b""), ctypes.c_int(flags), ctypes.c_uint(0), buffer))
    return b"%d:%d" % _device.unpack_from(buffer, _STATX_DEVICE_AT)


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
        if unescape(fields[4]) == mountpoint:
            return fields[2]
    return None


def unescape(field: bytes) -> bytes:
    """The path that a table of mounts has so, where `\\ooo` stands for the byte of that octal number."""
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


def _checked(result: int, path: bytes | None = None) -> int:
    """What a call of the C library has answered; raises OSError for what is less than nothing."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
