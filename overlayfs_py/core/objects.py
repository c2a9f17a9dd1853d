"""Reaching the object behind a node: its attributes, and a descriptor that refers to it whatever it is."""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import owners
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.requests import Attr
from overlayfs_py.records import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayfs_py.core.layers import Layer
    from overlayfs_py.core.overlay import Overlay


def real_of(node: Node) -> Real:
    """Where a node's attributes live."""
    return node.upper or node.lowers[0]


def layer_of(fs: Overlay, node: Node) -> Layer:
    """The layer that a node's attributes live in: the upper one for what was copied up after its last name had gone."""
    if node.pinned >= 0:
        assert fs.upper is not None
        return fs.upper
    return real_of(node).layer


def stat_real(fs: Overlay, real: Real) -> os.stat_result:
    if real.parent is None:
        return os.fstat(real.layer.fd)
    return os.stat(real.name, dir_fd=fs.dirs.fd(real.parent), follow_symlinks=False)


def stat_node(fs: Overlay, node: Node) -> os.stat_result:
    """The real attributes of a node, as its layer has them."""
    if node.pinned >= 0:
        return os.fstat(node.pinned)
    return stat_real(fs, real_of(node))


def open_path(fs: Overlay, real: Real) -> int:
    """A new O_PATH descriptor of the object itself, be it a symbolic link."""
    if real.parent is None:
        return os.dup(real.layer.fd)
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(real.name, flags, dir_fd=fs.dirs.fd(real.parent))


def check_kind(node: Node, st: os.stat_result) -> None:
    """ESTALE where a layer has something else now than when the node was found: it was changed behind our back."""
    if stat.S_IFMT(st.st_mode) != node.kind:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), node.name)


def open_file(fs: Overlay, real: Real, flags: int) -> int:
    """Open the regular file `real`; ESTALE where something else has taken its place, which could block or do worse."""
    if real.parent is None:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(real.name, flags, dir_fd=fs.dirs.fd(real.parent))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), real.name)
    except OSError:
        os.close(fd)
        raise
    return fd


class reached:
    """A descriptor that refers to a node's object, O_PATH or better, for as long as the block runs."""

    __slots__ = ("fs", "node", "opened")

    def __init__(self, fs: Overlay, node: Node) -> None:
        self.fs = fs
        self.node = node
        self.opened = -1

    def __enter__(self) -> int:
        if self.node.pinned >= 0:
            return self.node.pinned
        self.opened = open_path(self.fs, real_of(self.node))
        return self.opened

    def __exit__(self, *_: object) -> None:
        if self.opened >= 0:
            os.close(self.opened)


def attr(fs: Overlay, node: Node, st: os.stat_result | None = None) -> Attr:
    """The attributes the mount shows of a node; `st` are its real ones, where they are known already."""
    if st is None:
        st = stat_node(fs, node)
    uid, gid, mode, rdev = owners.shown(fs, node, st)
    nlink = st.st_nlink
    blocks = st.st_blocks
    if node.kind == stat.S_IFDIR:
        if fs.config.static_nlink or len(node.lowers) + (node.upper is not None) > 1:
            nlink = 1
        if node.removed:
            nlink = 0
    elif node.removed:
        # The name is gone from the mount, though a lower layer keeps it, or the index.
        if node.indexed:
            nlink = node.nlink
        elif node.pinned < 0 or not node.upper_ino:
            nlink = nlink - 1 if fs.nameless is not None and real_of(node).layer is fs.nameless else 0
    elif node.indexed:
        nlink = node.nlink
    if node.metacopy or (len(node.lowers) > 1 and node.kind == stat.S_IFREG):
        blocks = stat_real(fs, node.lowers[-1]).st_blocks
    return Attr(
        node.id,
        mode,
        nlink,
        uid,
        gid,
        rdev,
        st.st_size,
        blocks,
        st.st_blksize,
        st.st_atime_ns,
        st.st_mtime_ns,
        st.st_ctime_ns,
    )
