"""renameat2(2)."""

import ctypes

from overlayfs_py.sys.libc import LIBC, last_error

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_renameat2 = LIBC.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_renameat2.restype = ctypes.c_int


def renameat2(old_dir_fd: int, old: bytes, new_dir_fd: int, new: bytes, flags: int = 0) -> None:
    """Rename `old` in one directory to `new` in another; RENAME_WHITEOUT leaves a 0/0 device behind.

    Raises EEXIST with RENAME_NOREPLACE if `new` exists, ENOENT with RENAME_EXCHANGE if it does not, EINVAL for flags
    the filesystem does not have. Source: rename(2).
    """
    if _renameat2(old_dir_fd, old, new_dir_fd, new, flags) != 0:
        raise last_error(old)
