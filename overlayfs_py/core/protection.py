"""What chattr(1) has made immutable or append-only, and what can't be done to it then (ioctl_iflags(2)).

Elsewhere the kernel asks its own inode. Those of FUSE have no such flags, so every operation that changes something
asks here. The flags of a lower object are those of its file. Those of an upper one are kept in an xattr: set on the
file, they would keep the overlay, too, from moving it, marking it, and copying up what is below it. Where they are set
on the file all the same, they count as well. Source: fs/overlayfs/util.c (ovl_check_protattr, ovl_set_protattr).
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import objects
from overlayfs_py.core.nodes import Node
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import flags as inode_flags
from overlayfs_py.sys import xattrs

if TYPE_CHECKING:
    from overlayfs_py.core.layers import Layer
    from overlayfs_py.core.overlay import Overlay
    from overlayfs_py.core.work import Staged

IMMUTABLE = inode_flags.IMMUTABLE
APPEND = inode_flags.APPEND
BOTH = IMMUTABLE | APPEND

_KNOWN = 1
_COPIED = inode_flags.SYNC | inode_flags.NOATIME
_LETTERS = {ord("a"): APPEND, ord("i"): IMMUTABLE}


def of(fs: Overlay, node: Node) -> int:
    """Those of IMMUTABLE and APPEND that a node has. The disk is asked once."""
    if not node.protection:
        note(node, _read(fs, node))
    return node.protection & BOTH


def note(node: Node, flags: int) -> None:
    """Remember which of the two flags a node has."""
    node.protection = _KNOWN | flags


def check(fs: Overlay, node: Node, against: int = BOTH) -> None:
    """Raise EPERM for a node that has one of the flags `against`."""
    if of(fs, node) & against:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), node.name)


def check_removal(fs: Overlay, parent: Node, node: Node) -> None:
    """Raise EPERM where a name of `node` in `parent` may not go (may_delete in fs/namei.c)."""
    check(fs, parent)
    check(fs, node)


def _read(fs: Overlay, node: Node) -> int:
    if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
        return 0
    with objects.reached(fs, node) as fd:
        flags = _of_file(fs, objects.layer_of(fs, node), fd)
        return flags if node.upper is None and node.pinned < 0 else flags | _marked(fs, fd)


def _of_file(fs: Overlay, layer: Layer, fd: int) -> int:
    if layer in fs.flagless or not inode_flags.fixed(fd):
        return 0
    # erofs says so of all it holds, and has no flags.
    flags = inode_flags.get(fd, opened=False)
    if flags is None:
        fs.flagless.add(layer)
    return (flags or 0) & BOTH


def _marked(fs: Overlay, fd: int) -> int:
    """What the mark on an object of the upper layer says, as far as it can be understood."""
    try:
        if fs.marks.protattr not in xattrs.flist(fd):
            return 0
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # a filesystem without xattrs
        return 0
    # Only now, as to read user.* takes the right to read the file.
    value = xattrs.fget(fd, fs.marks.protattr)
    flags = 0
    for letter in value:
        if letter not in _LETTERS:
            break
        flags |= _LETTERS[letter]
    return flags


def mark(fs: Overlay, fd: int, flags: int) -> None:
    """Note on an object of the upper layer which of the two flags it has. Raises EPERM where it can hold no xattr."""
    value = b"a" * bool(flags & APPEND) + b"i" * bool(flags & IMMUTABLE)
    try:
        if value:
            xattrs.fset(fd, fs.marks.protattr, value)
        else:
            xattrs.fremove(fd, fs.marks.protattr)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and value:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from error
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        # there is no mark to be removed


def copy(fs: Overlay, source: int, staged: Staged, kind: int, *, opened: bool) -> None:
    """Give a copy the flags of its source, open or O_PATH: these two, and those of how it is to be written and read.

    Source: fs/overlayfs/copy_up.c (ovl_copy_fileattr).
    """
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return
    flags = inode_flags.get(source, opened=opened) or 0
    if flags & BOTH:
        try:
            mark(fs, staged.fd, flags)
        except PermissionError as error:
            if error.errno != errno.EPERM:
                raise
            # An upper that can't hold the mark is no reason to refuse the change, as the kernel has it.
    if flags & _COPIED:
        inode_flags.add(staged.fd, flags & _COPIED)
