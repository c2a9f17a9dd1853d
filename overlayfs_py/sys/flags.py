"""The flags of files and directories that chattr(1) shows and sets."""

import ctypes
import errno
import fcntl
import os
import struct

from overlayfs_py.sys.libc import AT_EMPTY_PATH, LIBC, last_error
from overlayfs_py.sys.paths import fd_path

FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820

# FS_*_FL, ioctl_iflags(2); statx(2) has the same numbers for two of them.
SYNC = 0x08
IMMUTABLE = 0x10
APPEND = 0x20
NOATIME = 0x80

_flags = struct.Struct("i")
# What filesystems without flags answer; ntfs-3g has an answer of its own.
_WITHOUT = frozenset((errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL))

# struct statx: a mask, a block size, then the attributes; 256 bytes in all.
_STATX_BYTES = 256
_attributes = struct.Struct("=IIQ")
_STATX_TYPE = 0x01

_statx = LIBC.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_statx.restype = ctypes.c_int


def fixed(fd: int) -> int:
    """Those of IMMUTABLE and APPEND that statx(2) says the object `fd`, which may be O_PATH, to have."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _statx(fd, b"", AT_EMPTY_PATH, _STATX_TYPE, buffer) != 0:
        raise last_error()
    attributes: int = _attributes.unpack_from(buffer)[2]
    return attributes & (IMMUTABLE | APPEND)


def get(fd: int, *, opened: bool) -> int | None:
    """All flags of the file or directory `fd`, which is O_PATH unless it is `opened`.

    None where its filesystem has no flags, 0 for a file that may not be read. Source: ioctl_iflags(2).
    """
    if opened:
        return _get(fd)
    try:
        fd = _open(fd)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        # only who may read it can ask
        return 0
    try:
        return _get(fd)
    finally:
        os.close(fd)


def add(fd: int, flags: int) -> None:
    """Give the file or directory `fd`, which may be O_PATH, further flags, if its filesystem has such things."""
    opened = _open(fd)
    try:
        fcntl.ioctl(opened, FS_IOC_SETFLAGS, _flags.pack((_get(opened) or 0) | flags))
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
        # none here
    finally:
        os.close(opened)


def _get(fd: int) -> int | None:
    try:
        found: int = _flags.unpack_from(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(_flags.size)))[0]
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
        # none here
        return None
    return found


def _open(fd: int) -> int:
    return os.open(fd_path(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
