"""Copying the data of a file: a reflink where the filesystem can, else in the kernel, else by read and write."""

from __future__ import annotations

import errno
import fcntl
import os

from overlayfs_py.sys import syncing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FICLONE = 0x40049409
_RANGE_CHUNK = 8 << 20
_READ_CHUNK = 1 << 20

# What FICLONE answers where a plain copy may still succeed: filesystems that differ (EXDEV) or cannot share extents
# (EOPNOTSUPP, EINVAL, ENOTTY, ENOSYS, and EBADF by its man page), an active swap file (ETXTBSY), a filter that forbids
# the call (EPERM), no room for the records of a shared extent (ENOSPC, which xfs has while there is room for data).
# If the reason was another one, the copy meets it again and reports it.
_CLONE_IMPOSSIBLE = frozenset(
    (
        errno.EXDEV,
        errno.EOPNOTSUPP,
        errno.EINVAL,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EBADF,
        errno.ETXTBSY,
        errno.EPERM,
        errno.ENOSPC,
    )
)

# What copy_file_range answers where read and write may still succeed, for the same reasons. EBADF stays an error: it
# means a descriptor with the wrong access mode.
_RANGE_IMPOSSIBLE = frozenset((errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ETXTBSY, errno.EPERM))


AT_ONCE_BYTES = 64 << 10
"""The most that copy_at_once is faster with."""


def goes_at_once(size: int, st: os.stat_result) -> bool:
    """Whether the first `size` bytes of a file with the attributes `st` are few and have no holes."""
    return 0 < size <= min(AT_ONCE_BYTES, st.st_blocks * 512)


def _never() -> bool:
    return False


def copy_data(
    src_fd: int,
    dst_fd: int,
    size: int,
    offset: int = 0,
    unwanted: Callable[[], bool] = _never,
    *,
    to_be_synced: bool = False,
) -> bool:
    """Copy the bytes from `offset` up to `size` to the same place of dst_fd, keeping holes.

    The answer is whether both files now share them, by a reflink. Of a copy `to_be_synced` the disk begins to write
    what is there already.
    dst_fd must hold nothing but holes from `offset` on; it ends with exactly `size` bytes. The file position of both
    descriptors is undefined afterwards. Blocks for as long as the data takes.
    Raises EIO if the source ends before `size`, and EINTR once `unwanted`, asked after some mebibytes each, says so.
    Source: ioctl_ficlone(2), lseek(2), copy_file_range(2).
    """
    cloned = offset == 0 and size > 0 and os.fstat(src_fd).st_size == size and _clone(src_fd, dst_fd)
    if cloned:
        if os.fstat(dst_fd).st_size < size:
            raise _short_source()
    else:
        _copy_segments(src_fd, dst_fd, offset, size, unwanted, to_be_synced=to_be_synced)
    if os.fstat(dst_fd).st_size != size:
        os.ftruncate(dst_fd, size)
    return cloned


def copy_at_once(src_fd: int, dst_fd: int, size: int) -> None:
    """As copy_data, of a few bytes without holes: one read and one write, which take less than all it would try."""
    data = os.pread(src_fd, size, 0)
    if len(data) < size:
        raise _short_source()
    if os.pwrite(dst_fd, data, 0) < size:
        _copy_by_hand(src_fd, dst_fd, 0, size, _never)


def _clone(src_fd: int, dst_fd: int) -> bool:
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno not in _CLONE_IMPOSSIBLE:
            raise
        return False
    return True


def _copy_segments(
    src_fd: int, dst_fd: int, pos: int, end: int, unwanted: Callable[[], bool], *, to_be_synced: bool
) -> None:
    in_kernel = True
    while pos < end:
        start, stop = _next_data(src_fd, pos, end)
        if in_kernel:
            start, in_kernel = _copy_range(src_fd, dst_fd, start, stop, unwanted, to_be_synced=to_be_synced)
        if start < stop:
            _copy_by_hand(src_fd, dst_fd, start, stop, unwanted)
        pos = stop


def _next_data(src_fd: int, pos: int, end: int) -> tuple[int, int]:
    """The first stretch of data in [pos, end); empty at `end` if only a hole is left."""
    try:
        start = os.lseek(src_fd, pos, os.SEEK_DATA)
        stop = os.lseek(src_fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            # Only a hole is left, unless the source ends here; files without a size, as in /proc, end everywhere.
            if os.fstat(src_fd).st_size >= end:
                return end, end
            return pos, end
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            # The filesystem cannot tell holes: everything is data.
            return pos, end
        raise
    if start >= end:
        return end, end
    # A filesystem that reports an empty stretch would never let the copy end.
    return start, min(stop, end) if stop > start else end


def _copy_range(
    src_fd: int, dst_fd: int, pos: int, end: int, unwanted: Callable[[], bool], *, to_be_synced: bool
) -> tuple[int, bool]:
    """Copy [pos, end) in the kernel; the position reached and whether the kernel can go on."""
    while pos < end:
        _go_on(unwanted)
        try:
            count = os.copy_file_range(src_fd, dst_fd, min(end - pos, _RANGE_CHUNK), pos, pos)
        except OSError as error:
            if error.errno not in _RANGE_IMPOSSIBLE:
                raise
            return pos, False
        if count == 0:
            # The end of the source, or a file whose size is not known before it is read: read(2) tells them apart.
            return pos, False
        if to_be_synced and count == _RANGE_CHUNK:
            syncing.begin(dst_fd, pos, count)
        pos += count
    return pos, True


def _copy_by_hand(src_fd: int, dst_fd: int, pos: int, end: int, unwanted: Callable[[], bool]) -> None:
    buffer = memoryview(bytearray(min(end - pos, _READ_CHUNK)))
    while pos < end:
        _go_on(unwanted)
        count = os.preadv(src_fd, [buffer[: min(end - pos, _READ_CHUNK)]], pos)
        if count == 0:
            raise _short_source()
        done = 0
        while done < count:
            done += os.pwrite(dst_fd, buffer[done:count], pos + done)
        pos += count


def _go_on(unwanted: Callable[[], bool]) -> None:
    if unwanted():
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))


def _short_source() -> OSError:
    return OSError(errno.EIO, "the source of a copy is shorter than expected")
