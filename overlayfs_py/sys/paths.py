"""Opening names so that no symbolic link is ever followed, and paths that name descriptors."""

import ctypes
import errno
import os
import time

from overlayfs_py.sys.libc import LIBC

PATH_MAX = 4096
"""Longest path in bytes a system call takes, its final NUL included (limits.h)."""

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_IN_ROOT = 0x10
_EAGAIN_ATTEMPTS = 64
_EAGAIN_PAUSES = 200
_EAGAIN_PAUSE = 0.005  # seconds


_BENEATH = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
_IN_ROOT = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS


class _OpenHow(ctypes.Structure):
    """struct open_how, linux/openat2.h."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


_OPEN_HOW_SIZE = ctypes.sizeof(_OpenHow)
_openat2 = ctypes.CFUNCTYPE(
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    use_errno=True,
)(("syscall", LIBC))


def open_beneath(root_fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open a relative path that lies below root_fd, through no symbolic link; close-on-exec.

    An empty path or b"." is the root itself. A path of PATH_MAX bytes or more is opened in pieces. With O_PATH and
    O_NOFOLLOW a symbolic link as the last component is opened itself, otherwise it is ELOOP. mode counts only with
    O_CREAT or O_TMPFILE.
    Raises EXDEV for an absolute path or one that leaves the root, ELOOP for a symbolic link on the way, ENOSYS on a
    kernel before 5.6, EAGAIN if the tree is renamed faster than the path can be walked. Source: openat2(2).
    """
    if len(path) < PATH_MAX:
        return _open_piece(root_fd, path or b".", flags, mode)
    head, rest = _split(path)
    fd = _open_piece(root_fd, head, os.O_PATH | os.O_DIRECTORY, 0)
    while len(rest) >= PATH_MAX:
        try:
            head, rest = _split(rest)
            next_fd = _open_piece(fd, head, os.O_PATH | os.O_DIRECTORY, 0)
        finally:
            os.close(fd)
        fd = next_fd
    try:
        return _open_piece(fd, rest or b".", flags, mode)
    finally:
        os.close(fd)


def open_in_root(root_fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open a path as a process would whose root is root_fd: all symbolic links stay below it; close-on-exec.

    Raises ELOOP for a magic link, ENAMETOOLONG for a path of PATH_MAX bytes or more. Source: openat2(2).
    """
    return _open_piece(root_fd, path or b".", flags, mode, _IN_ROOT)


def _split(path: bytes) -> tuple[bytes, bytes]:
    """Cut a path at the last slash that leaves a first piece short enough for one call."""
    cut = path.rfind(b"/", 1, PATH_MAX)
    if cut < 0:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path[:256])
    return path[:cut], path[cut:].lstrip(b"/")


def _open_piece(dir_fd: int, path: bytes, flags: int, mode: int, resolve: int = _BENEATH) -> int:
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    address = ctypes.addressof(how)
    attempts = 0
    while True:
        fd: int = _openat2(_SYS_OPENAT2, dir_fd, path, address, _OPEN_HOW_SIZE)
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number == errno.EAGAIN and attempts < _EAGAIN_ATTEMPTS + _EAGAIN_PAUSES:
            # A rename elsewhere made the kernel unsure that ".." stayed below the root; openat2(2) says to retry.
            attempts += 1
            if attempts > _EAGAIN_ATTEMPTS:
                time.sleep(_EAGAIN_PAUSE)
            continue
        if number == errno.ENOSYS:
            raise OSError(number, "openat2 is missing: Linux 5.6 or later is needed", path)
        raise OSError(number, os.strerror(number), path)


def open_dir_at(dir_fd: int, name: bytes) -> int:
    """Open the directory `name` (one component) as an O_PATH descriptor; a symbolic link is ENOTDIR."""
    return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def open_dir_read(dir_fd: int, name: bytes = b".") -> int:
    """Open a directory for listing, locking or syncing, by default the one dir_fd refers to (it may be O_PATH)."""
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def fd_path(fd: int) -> bytes:
    """A path that leads to what fd refers to, even if that is a symbolic link or has no name (proc(5))."""
    return b"/proc/self/fd/%d" % fd


def child_path(dir_fd: int, name: bytes) -> bytes:
    """A path to `name` (one component) in the directory dir_fd refers to, for calls that take no descriptor."""
    assert b"/" not in name, name
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)
