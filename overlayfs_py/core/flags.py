"""File attribute flags, as chattr(1) shows and sets them (ioctl_iflags(2), ioctl_xfs_fsgetxattr(2)).

They are those of the real object, which keeps to them itself: what is immutable in the upper layer stays so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from overlayfs_py.core import copyup, objects
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.requests import Steps
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys.paths import fd_path

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
READING = frozenset((FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR))
WRITING = frozenset((FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR))

_SIZE = 28  # bytes of struct fsxattr; the flags alone are an int


def get_flags(fs: Overlay, node: Node, command: int, size: int) -> bytes:
    """The answer of one of READING, `size` bytes of it.

    Raises ENOTTY for what is neither file nor directory, and what the layer's filesystem answers.
    """
    fd = _open(fs, node)
    try:
        return fcntl.ioctl(fd, command, bytes(_SIZE))[:size]
    finally:
        os.close(fd)


def set_flags(fs: Overlay, node: Node, command: int, value: bytes) -> Steps[None]:
    """Copy up, then carry out one of WRITING; the kernel has checked that the caller may. Raises as get_flags."""
    if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    yield from copyup.copy_up(fs, node, data=False)
    fd = _open(fs, node)
    try:
        fcntl.ioctl(fd, command, value.ljust(_SIZE, b"\0"))
    finally:
        os.close(fd)
    # Whether a file may be written is asked when it is opened.
    fs.files.drop(node)


def _open(fs: Overlay, node: Node) -> int:
    if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    with objects.reached(fs, node) as fd:
        return os.open(fd_path(fd), os.O_RDONLY | os.O_CLOEXEC)
