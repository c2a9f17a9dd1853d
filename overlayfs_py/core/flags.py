"""File attribute flags, as chattr(1) shows and sets them (ioctl_iflags(2), ioctl_xfs_fsgetxattr(2)).

They are those of the real object, but for what protection keeps elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys

from overlayfs_py.core import copyup, objects, protection
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.requests import Steps
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys.flags import (
    APPEND,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    IMMUTABLE,
)
from overlayfs_py.sys.paths import fd_path

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

READING = frozenset((FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR))
WRITING = frozenset((FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR))

_SIZE = 28  # bytes of struct fsxattr; the flags alone are an int
_WORD = 4  # bytes of the flags, which come first in either
# FS_XFLAG_IMMUTABLE and FS_XFLAG_APPEND, by the flags they are for the other two commands.
_EXTENDED = {IMMUTABLE: 0x08, APPEND: 0x10}
_PLAIN = {IMMUTABLE: IMMUTABLE, APPEND: APPEND}


def get_flags(fs: Overlay, node: Node, command: int, size: int) -> bytes:
    """The answer of one of READING, `size` bytes of it.

    Raises ENOTTY for what is neither file nor directory, and what the layer's filesystem answers.
    """
    fd = _open(fs, node)
    try:
        answer = fcntl.ioctl(fd, command, bytes(_SIZE))
    finally:
        os.close(fd)
    bits = _PLAIN if command == FS_IOC_GETFLAGS else _EXTENDED
    _, answer = _parted(answer, bits)
    protected = protection.of(fs, node)
    word = _word(answer) | sum(bit for flag, bit in bits.items() if protected & flag)
    return (_bytes(word) + answer[_WORD:])[:size]


def set_flags(fs: Overlay, node: Node, command: int, value: bytes) -> Steps[None]:
    """Copy up, then carry out one of WRITING; the kernel has checked that the caller may. Raises as get_flags."""
    if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    yield from copyup.copy_up(fs, node, data=False)
    protected, value = _parted(value.ljust(_SIZE, b"\0"), _PLAIN if command == FS_IOC_SETFLAGS else _EXTENDED)
    fd = _open(fs, node)
    try:
        # First, as what is set on the file itself would keep it from being marked.
        fcntl.ioctl(fd, command, value)
        protection.mark(fs, fd, protected)
    finally:
        os.close(fd)
    protection.note(node, protected)
    # Whether a file may be written is asked when it is opened.
    fs.files.drop(node)


def _parted(value: bytes, bits: dict[int, int]) -> tuple[int, bytes]:
    """What protection keeps of the flags that `value` begins with, and `value` without it."""
    word = _word(value)
    kept = 0
    for flag, bit in bits.items():
        if word & bit:
            kept |= flag
            word &= ~bit
    return kept, _bytes(word) + value[_WORD:]


def _word(value: bytes) -> int:
    return int.from_bytes(value[:_WORD], sys.byteorder)


def _bytes(word: int) -> bytes:
    return word.to_bytes(_WORD, sys.byteorder)


def _open(fs: Overlay, node: Node) -> int:
    if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    with objects.reached(fs, node) as fd:
        return os.open(fd_path(fd), os.O_RDONLY | os.O_CLOEXEC)
