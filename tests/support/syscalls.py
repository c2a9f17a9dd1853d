"""System calls the standard library lacks, for tests; each raises OSError with the kernel's errno."""

import ctypes
import os
from typing import Final

MS_RDONLY: Final = 1
MS_NOATIME: Final = 1024
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 2
CLONE_NEWNS: Final = 0x00020000
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

CLONE_NEWUSER: Final = 0x10000000

_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, name: bytes | None = None) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def mount(source: bytes, target: bytes, fstype: bytes | None, flags: int = 0, data: bytes | None = None) -> None:
    """mount(2)."""
    _checked(_libc.mount(source, target, fstype, ctypes.c_ulong(flags), data), target)


def umount(target: bytes, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(target, flags), target)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(flags))


def become_subreaper() -> None:
    """Orphaned descendants become children of this process, PR_SET_CHILD_SUBREAPER of prctl(2)."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0))


def renameat2(old: bytes, new: bytes, flags: int = 0) -> None:
    """renameat2(2) relative to the current directory."""
    _checked(_libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, ctypes.c_uint(flags)), old)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def utimensat(path: bytes, atime: int, mtime: int, *, follow: bool = True) -> None:
    """utimensat(2): times in nanoseconds since the epoch, or UTIME_NOW or UTIME_OMIT."""
    times = (_Timespec * 2)()
    for slot, stamp in zip(times, (atime, mtime), strict=True):
        slot.seconds, slot.nanoseconds = (0, stamp) if stamp in (UTIME_NOW, UTIME_OMIT) else divmod(stamp, 10**9)
    _checked(_libc.utimensat(_AT_FDCWD, path, times, 0 if follow else _AT_SYMLINK_NOFOLLOW), path)
