"""How much of a tree the page cache holds."""

import ctypes
import os
from pathlib import Path
from typing import Final

_SYS_CACHESTAT: Final = 451
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("offset", "length")]


class _Cachestat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def read_into_cache(root: Path) -> dict[tuple[int, int], int]:
    """Read the files below a directory; returns the bytes of each, by device and inode, that the page cache then holds.

    A filesystem that passes reads on to another one's page cache, as the kernel's overlayfs does, holds none of its
    own. Raises ENOSYS before Linux 6.5. Source: cachestat in mm/filemap.c.
    """
    found = {}
    buffer = bytearray(1 << 20)
    for directory, _, names in os.walk(root):
        for name in names:
            # Counted before it is closed, since some filesystems drop what is cached of a file at its next open.
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                while os.readv(descriptor, [buffer]):
                    pass
                status = os.fstat(descriptor)
                found[status.st_dev, status.st_ino] = _pages(descriptor) * _PAGE
            finally:
                os.close(descriptor)
    return found


def _pages(descriptor: int) -> int:
    # A length of 0 means to the end.
    everything, found = _Range(0, 0), _Cachestat()
    status = _libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT), descriptor, ctypes.byref(everything), ctypes.byref(found), ctypes.c_uint(0)
    )
    if status < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found.cached)
