"""Making files, changing their attributes, listing directories; names are never followed."""

import ctypes
import errno
import os
import stat
import struct

from overlayfs_py.sys.libc import AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, LIBC, last_error
from overlayfs_py.sys.paths import fd_path

NOW = 1 << 100
"""For utimens and futimens: the time at which the filesystem is, whose clock is a coarser one than anybody else's."""

_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2
_SYS_FCHMODAT2 = 452
_LISTING_BUFFER = 64 << 10


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


_Times = _Timespec * 2

_utimensat = LIBC.utimensat
_utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_utimensat.restype = ctypes.c_int
_fchmodat2 = ctypes.CFUNCTYPE(
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    use_errno=True,
)(("syscall", LIBC))
_fallocate = LIBC.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_syncfs = LIBC.syncfs
_syncfs.argtypes = (ctypes.c_int,)
_syncfs.restype = ctypes.c_int
_linkat = LIBC.linkat
_linkat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_linkat.restype = ctypes.c_int
_getdents64 = LIBC.getdents64
_getdents64.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_getdents64.restype = ctypes.c_ssize_t

# struct linux_dirent64 up to its name: inode, offset, length of the record, type (getdents(2)).
_dirent_header = struct.Struct("=QqHB")
_NAME_AT = 19


def tmpfile(dir_fd: int, mode: int) -> int:
    """Open a new file that has no name yet, for reading and writing; it is on the filesystem of dir_fd.

    The umask applies to mode. Raises EOPNOTSUPP, or EISDIR from some filesystems, where there is no O_TMPFILE.
    Source: open(2).
    """
    return os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=dir_fd)


def link_fd(fd: int, dir_fd: int, name: bytes) -> None:
    """Give the file fd refers to a name; EEXIST if it is taken.

    By AT_EMPTY_PATH where this process may, or else through /proc, which takes longer. Source: linkat(2).
    """
    if _linkat(fd, b"", dir_fd, name, AT_EMPTY_PATH) == 0:
        return
    error = last_error(name)
    if error.errno != errno.ENOENT:
        raise error
    # without CAP_DAC_READ_SEARCH in the first user namespace, or the directory is gone
    os.link(fd_path(fd), name, dst_dir_fd=dir_fd, follow_symlinks=True)


def make_node(dir_fd: int, name: bytes, mode: int, rdev: int) -> None:
    """Make a device, FIFO, socket or regular file; the type is in mode; the umask applies. Source: mknod(2)."""
    os.mknod(name, mode, rdev, dir_fd=dir_fd)


def utimens(dir_fd: int, name: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set times in nanoseconds since the epoch, of the name itself, or to NOW; None leaves one as it is.

    Source: utimensat(2).
    """
    if _utimensat(dir_fd, name, ctypes.byref(_times(atime_ns, mtime_ns)), AT_SYMLINK_NOFOLLOW) != 0:
        raise last_error(name)


def futimens(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """As utimens, of what fd refers to; fd may be O_PATH (Linux 5.8)."""
    if _utimensat(fd, b"", ctypes.byref(_times(atime_ns, mtime_ns)), AT_EMPTY_PATH) != 0:
        raise last_error()


def _times(atime_ns: int | None, mtime_ns: int | None) -> "ctypes.Array[_Timespec]":
    times = _Times()
    for slot, ns in zip(times, (atime_ns, mtime_ns), strict=True):
        if ns is None:
            slot.tv_nsec = _UTIME_OMIT
        elif ns == NOW:
            slot.tv_nsec = _UTIME_NOW
        else:
            slot.tv_sec, slot.tv_nsec = divmod(ns, 1_000_000_000)
    return times


def chmod_at(dir_fd: int, name: bytes, mode: int) -> None:
    """Set the permission bits of `name`; a symbolic link is EOPNOTSUPP. Source: fchmodat2(2)."""
    if _fchmodat2(_SYS_FCHMODAT2, dir_fd, name, mode, AT_SYMLINK_NOFOLLOW) == 0:
        return
    error = last_error(name)
    if error.errno != errno.ENOSYS:
        raise error
    _chmod_through_descriptor(dir_fd, name, mode)


def _chmod_through_descriptor(dir_fd: int, name: bytes, mode: int) -> None:
    """chmod_at for kernels before 6.6."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), name)
        os.chmod(fd_path(fd), mode)
    finally:
        os.close(fd)


def chown_at(dir_fd: int, name: bytes, uid: int, gid: int) -> None:
    """Set the owner of the name itself; -1 leaves one as it is. Source: fchownat(2)."""
    os.chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=False)


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): allocate, punch, zero, collapse or insert a range of bytes, as the FALLOC_FL_* bits of mode say."""
    while _fallocate(fd, mode, offset, length) != 0:
        error = last_error()
        if error.errno != errno.EINTR:
            raise error


def sync_filesystem(fd: int) -> None:
    """Write all of the filesystem that fd is on to disk; fd is not O_PATH. Source: syncfs(2)."""
    if _syncfs(fd) != 0:
        raise last_error()


def list_dir(fd: int) -> list[tuple[bytes, int, int]]:
    """All entries of a readable directory from its start: name, inode number, type (DT_*); not "." and "..".

    The type is 0 (DT_UNKNOWN) on filesystems that don't store it. Source: getdents(2).
    """
    os.lseek(fd, 0, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(_LISTING_BUFFER)
    address = ctypes.addressof(buffer)
    unpack = _dirent_header.unpack_from
    entries: list[tuple[bytes, int, int]] = []
    while True:
        count: int = _getdents64(fd, address, _LISTING_BUFFER)
        if count < 0:
            error = last_error()
            if error.errno == errno.EINTR:
                continue
            raise error
        if count == 0:
            return entries
        records = ctypes.string_at(address, count)
        at = 0
        while at < count:
            ino, _, length, kind = unpack(records, at)
            name_at = at + _NAME_AT
            name = records[name_at : records.index(0, name_at)]
            if name != b"." and name != b"..":
                entries.append((name, ino, kind))
            at += length
