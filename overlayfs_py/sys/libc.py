"""The C library, for calls the standard library has no function for."""

import ctypes
import os

# Releases the GIL around each call and keeps errno for ctypes.get_errno().
LIBC = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000


def last_error(name: bytes | None = None) -> OSError:
    """The OSError of the call that has just failed in this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)
