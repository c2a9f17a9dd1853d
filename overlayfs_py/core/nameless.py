"""Objects of the upper layer without a name that somebody still refers to: removed while open, or made by O_TMPFILE.

A descriptor keeps each. Where many are kept so already, further ones get a name in the work directory, which goes with
the last reference; what a crash leaves there is cleared by the next mount. Directories that a rename replaces are kept
by descriptors alone, as they can't be linked.
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import objects
from overlayfs_py.core.layers import Layer
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.work import Staged
from overlayfs_py.records import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

# Where an object can't have a further name, for want of room, or as it has as many as can be or may not: a descriptor.
_UNLINKABLE = frozenset((errno.EMLINK, errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP))


class Kept(NamedTuple):
    """What keeps an object whose last name is about to go: a descriptor, or a name in the work directory."""

    fd: int = -1
    name: bytes | None = None


def keep(fs: Overlay, node: Node, *, moves: bool) -> Kept:
    """See that an object of the upper layer can be reached once its last name is gone.

    A directory gets a name in the work directory only where the caller `moves` it there.
    """
    assert node.upper is not None
    if fs.pins >= fs.most_pins and node.upper.parent is not None and (moves or node.kind != stat.S_IFDIR):
        work = fs.writable()
        name = work.temporary_name()
        if node.kind == stat.S_IFDIR:
            return Kept(name=name)
        try:
            source = fs.dirs.fd(node.upper.parent)
            os.link(node.upper.name, name, src_dir_fd=source, dst_dir_fd=work.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _UNLINKABLE:
                raise
        else:
            return Kept(name=name)
    return Kept(objects.open_path(fs, node.upper))


def undo(fs: Overlay, kept: Kept) -> None:
    """The last name stays after all."""
    if kept.fd >= 0:
        os.close(kept.fd)
    if kept.name is not None:
        work = fs.writable()
        try:
            os.stat(kept.name, dir_fd=work.fd, follow_symlinks=False)
        except FileNotFoundError:
            # a directory that has not been moved
            return
        work.discard(kept.name)


def take(fs: Overlay, node: Node, kept: Kept) -> None:
    """The last name is gone."""
    if kept.fd >= 0:
        node.pinned = kept.fd
        fs.pins += 1
    elif kept.name is not None:
        _move_to_work(fs, node, kept.name)


def keep_staged(fs: Overlay, node: Node, staged: Staged) -> None:
    """Have a node be what has been built in the work directory, without any other name."""
    if fs.pins < fs.most_pins:
        take(fs, node, Kept(staged.detach()))
        return
    if staged.name is None:
        name = staged.work.temporary_name()
        staged.link(staged.work.fd, name)
        staged.name = name
    _move_to_work(fs, node, staged.name)
    # No longer what is being built.
    staged.name = None


def let_go(fs: Overlay, node: Node) -> None:
    """Nobody refers to a node any more, or it has got a name again, which `upper` then tells."""
    if node.pinned >= 0:
        fs.close_later(node.pinned)
        node.pinned = -1
        fs.pins -= 1


def let_go_of_name(fs: Overlay, real: Real | None) -> None:
    """As let_go, for the name in the work directory that `real` may be."""
    if real is not None and fs.nameless is not None and real.layer is fs.nameless:
        fs.writable().discard(real.name)


def named_in_work(fs: Overlay, node: Node) -> bool:
    """Whether the one name that an object has on disk is one that the mount doesn't show."""
    return fs.nameless is not None and node.upper is not None and node.upper.layer is fs.nameless


def _move_to_work(fs: Overlay, node: Node, name: bytes) -> None:
    if fs.nameless is None:
        assert fs.upper is not None
        fs.nameless = Layer(b"work", os.dup(fs.writable().fd), 0)
        fs.nameless.override = fs.upper.override
    node.upper = Real(fs.nameless, fs.nameless.root, name)
