"""Extended attributes of a name in a directory, or of what a descriptor refers to; symbolic links are not followed.

Keys are bytes and need not be UTF-8. Sets and removals by name go through the xattr package. Reads and listings use the
standard library: the package reads a value with two system calls and gives up with ERANGE if it grows between them,
and its listing fails on a key that is not UTF-8. So do sets by descriptor, which would take twice as long.
"""

import builtins
import errno
import os

import xattr

from overlayfs_py.sys.paths import child_path, fd_path

# The package numbers its options differently from setxattr(2).
_OPTIONS: dict[int, int] = {0: 0, os.XATTR_CREATE: xattr.XATTR_CREATE, os.XATTR_REPLACE: xattr.XATTR_REPLACE}


def get(dir_fd: int, name: bytes, key: bytes) -> bytes:
    """The value of `key`; ENODATA if it is not there, EOPNOTSUPP where there are no xattrs. Source: xattr(7)."""
    return os.getxattr(child_path(dir_fd, name), key, follow_symlinks=False)


def set(dir_fd: int, name: bytes, key: bytes, value: bytes, flags: int = 0) -> None:
    """Set `key`; flags are os.XATTR_CREATE (EEXIST if it is there) or os.XATTR_REPLACE (ENODATA if it is not)."""
    xattr.setxattr(child_path(dir_fd, name), key, value, _options(flags), symlink=True)


def list(dir_fd: int, name: bytes) -> builtins.list[bytes]:
    """All keys this process may see, in the filesystem's order."""
    return [os.fsencode(key) for key in os.listxattr(child_path(dir_fd, name), follow_symlinks=False)]


def remove(dir_fd: int, name: bytes, key: bytes) -> None:
    """Remove `key`; ENODATA if it is not there."""
    xattr.removexattr(child_path(dir_fd, name), key, symlink=True)


def fget(fd: int, key: bytes) -> bytes:
    """As get, of what fd refers to; fd may be O_PATH."""
    return os.getxattr(fd_path(fd), key)


def fset(fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """As set, of what fd refers to; fd may be O_PATH."""
    _options(flags)
    os.setxattr(fd_path(fd), key, value, flags)


def flist(fd: int) -> builtins.list[bytes]:
    """As list, of what fd refers to; fd may be O_PATH."""
    return [os.fsencode(key) for key in os.listxattr(fd_path(fd))]


def fremove(fd: int, key: bytes) -> None:
    """As remove, of what fd refers to; fd may be O_PATH."""
    xattr.removexattr(fd_path(fd), key)


def _options(flags: int) -> int:
    try:
        return _OPTIONS[flags]
    except KeyError:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
