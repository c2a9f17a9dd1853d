"""File handles and filesystem UUIDs: names of files that survive a rename and a remount."""

import ctypes
import errno
import fcntl
import os

from overlayfs_py.sys.libc import AT_EMPTY_PATH, LIBC, last_error
from overlayfs_py.sys.paths import fd_path

_MAX_HANDLE_SIZE = 128
_AT_HANDLE_FID = 0x200
_FS_IOC_GETFSUUID = 0x80111500
_BTRFS_IOC_FS_INFO = 0x8400941F


class _FileHandle(ctypes.Structure):
    """struct file_handle with room for any handle, open_by_handle_at(2)."""

    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_SIZE),
    ]


_name_to_handle_at = LIBC.name_to_handle_at
_name_to_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_name_to_handle_at.restype = ctypes.c_int
_open_by_handle_at = LIBC.open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_open_by_handle_at.restype = ctypes.c_int


def file_handle(dir_fd: int, name: bytes) -> tuple[int, bytes]:
    """The type and bytes of the handle of `name`, not following it; of dir_fd itself if the name is empty.

    Where the filesystem can't open handles, one that only identifies the file is returned (AT_HANDLE_FID, Linux 6.5).
    Raises EOPNOTSUPP where there are no handles at all. Source: name_to_handle_at(2).
    """
    handle = _FileHandle(_MAX_HANDLE_SIZE)
    mount_id = ctypes.c_int()
    flags = 0 if name else AT_EMPTY_PATH
    result = _name_to_handle_at(dir_fd, name, ctypes.byref(handle), ctypes.byref(mount_id), flags)
    if result != 0:
        error = last_error(name)
        if error.errno != errno.EOPNOTSUPP:
            raise error
        handle.handle_bytes = _MAX_HANDLE_SIZE
        flags |= _AT_HANDLE_FID
        if _name_to_handle_at(dir_fd, name, ctypes.byref(handle), ctypes.byref(mount_id), flags) != 0:
            # The first answer is the true one: a kernel without the flag says EINVAL to it.
            raise error
    return handle.handle_type, bytes(handle.f_handle[: handle.handle_bytes])


def open_by_handle(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> int:
    """Open a file by its handle, close-on-exec; mount_fd is any descriptor, not O_PATH, on the same filesystem.

    Needs CAP_DAC_READ_SEARCH. Raises ESTALE if the file is gone. Source: open_by_handle_at(2).
    """
    if len(handle) > _MAX_HANDLE_SIZE:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    struct = _FileHandle(len(handle), handle_type)
    ctypes.memmove(struct.f_handle, handle, len(handle))
    fd: int = _open_by_handle_at(mount_fd, ctypes.byref(struct), flags | os.O_CLOEXEC)
    if fd < 0:
        raise last_error()
    return fd


def filesystem_uuid(fd: int) -> bytes | None:
    """The UUID (16 bytes) of the filesystem fd is on, or None if it has none or the kernel is older than 6.9.

    fd may be an O_PATH descriptor of a directory or regular file. Source: FS_IOC_GETFSUUID, linux/fs.h; btrfs has but a
    call of its own, BTRFS_IOC_FS_INFO, linux/btrfs.h.
    """
    readable = os.open(fd_path(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        answer = _ask(readable, _FS_IOC_GETFSUUID, 17)
        if answer is not None:
            length = answer[0]
            return answer[1 : 1 + length] if length == 16 else None
        # struct btrfs_ioctl_fs_info_args: two 64-bit numbers, then the UUID.
        answer = _ask(readable, _BTRFS_IOC_FS_INFO, 1024)
        return answer[16:32] if answer is not None else None
    finally:
        os.close(readable)


def _ask(fd: int, request: int, size: int) -> bytes | None:
    """What an ioctl that only answers says; None where it is unknown."""
    try:
        return fcntl.ioctl(fd, request, bytes(size))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            # ENOTTY: no such call, or nothing to tell; the others: an older kernel asked the filesystem, which said so.
            return None
        raise
