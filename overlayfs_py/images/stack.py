"""A stack of layers read in place, without a mount: what a path leads to, with all marks obeyed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from overlayfs_py.config import MountConfig
from overlayfs_py.core import attrs, lookup, readdir
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.errors import LayerError
from overlayfs_py.images.archive import Attributes
from overlayfs_py.images.model import ImageError


class Stack:
    """The merged tree of some layers. Its methods raise OSError."""

    __slots__ = ("fs",)

    def __init__(self, fs: Overlay) -> None:
        self.fs = fs

    @property
    def root(self) -> Node:
        return self.fs.root

    def find(self, path: bytes) -> Node | None:
        """The object at a path below the root, through no symbolic link; None where there is none."""
        node = self.fs.root
        if not path:
            return node
        for name in path.split(b"/"):
            if node.kind != stat.S_IFDIR:
                return None
            found = self.child(node, name)
            if found is None:
                return None
            node = found
        return node

    def child(self, node: Node, name: bytes) -> Node | None:
        """The object `name` in a directory, None where there is none."""
        try:
            return lookup.lookup(self.fs, node, name)
        except FileNotFoundError:
            return None

    def names(self, node: Node) -> list[bytes]:
        """The names in a directory, sorted."""
        return sorted(readdir.names(self.fs, node))

    def attributes(self, node: Node) -> Attributes:
        """Owner, mode, times and xattrs of an object, without the overlay's own."""
        shown = attrs.getattr(self.fs, node)
        keys = sorted(attrs.listxattr(self.fs, node))
        values = tuple((key, attrs.getxattr(self.fs, node, key)) for key in keys)
        return Attributes(stat.S_IMODE(shown.mode), shown.uid, shown.gid, shown.atime_ns, shown.mtime_ns, values)


@contextmanager
def open_stack(layers: Sequence[Path], *, userxattr: bool) -> Iterator[Stack]:
    """The tree of these layers, topmost first, while the block runs. Raises ImageError where one is missing."""
    config = MountConfig(
        lowerdirs=tuple(os.fsencode(path) for path in layers),
        mountpoint=b"/",
        redirect_dir="follow",
        metacopy=None if userxattr else True,
        userxattr=userxattr,
        read_only=True,
    )
    try:
        fs = Overlay.open(config)
    except LayerError as error:
        raise ImageError(str(error)) from error
    try:
        yield Stack(fs)
    finally:
        fs.close()
