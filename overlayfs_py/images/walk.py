"""Going through what an upper layer holds, beside what is below it, at the cost of what it holds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from overlayfs_py.core.marks import DOT_META, DOT_WHITEOUT
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.images.stack import Stack, open_stack
from overlayfs_py.sys import files, paths


class Visit(NamedTuple):
    """One path (relative, b"" for the root) of which the upper layer says something.

    `node` is what the whole stack has there, None where it hides what is below; `below` what the lower layers have,
    None where nothing. A directory is `replaced` when it doesn't merge with the one below at its path. `fresh` says
    that such a directory is above, so that nothing of what is below is seen here.
    """

    path: bytes
    node: Node | None
    below: Node | None
    replaced: bool
    fresh: bool


class Walk:
    """An upper layer on lower ones. To be closed, or used with `with`. Its methods raise OSError."""

    __slots__ = ("_closing", "below", "merged")

    def __init__(self, upper: Path, lowers: Sequence[Path], *, userxattr: bool) -> None:
        """`lowers` are topmost first, and may be none. Raises ImageError where a layer can't be opened."""
        with ExitStack() as closing:
            self.merged: Stack = closing.enter_context(open_stack([upper, *lowers], userxattr=userxattr))
            self.below: Stack | None = None
            if lowers:
                self.below = closing.enter_context(open_stack(lowers, userxattr=userxattr))
            self._closing = closing.pop_all()

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def visits(self) -> Iterator[Visit]:
        """Every path, parents before what is in them, names sorted."""
        below = self.below.root if self.below is not None else None
        pending = [Visit(b"", self.merged.root, below, False, False)]
        while pending:
            visit = pending.pop()
            yield visit
            if visit.node is not None and visit.node.kind == stat.S_IFDIR:
                # The last is taken first.
                pending += reversed(list(self._children(visit, visit.node)))

    def _children(self, parent: Visit, node: Node) -> Iterator[Visit]:
        below = parent.below if parent.below is not None and parent.below.kind == stat.S_IFDIR else None
        for name in sorted(self._names(parent, node, below)):
            child = self.merged.child(node, name)
            lower = self.below.child(below, name) if below is not None and self.below is not None else None
            if child is None and lower is None:
                continue
            path = parent.path + b"/" + name if parent.path else name
            yield Visit(
                path, child, lower, child is not None and self._replaces(child, lower), parent.fresh or parent.replaced
            )

    def _names(self, parent: Visit, node: Node, below: Node | None) -> set[bytes]:
        """The names of a directory that may differ from what is below."""
        if parent.replaced or parent.fresh:
            names = set(self.merged.names(node))
            if below is not None and self.below is not None:
                names.update(self.below.names(below))
            return names
        names = set()
        top = node.lowers[0]
        fd = paths.open_dir_read(self.merged.fs.dirs.fd(top))
        try:
            for name, _, _ in files.list_dir(fd):
                names.add(name)
                if name.startswith(DOT_WHITEOUT) and not name.startswith(DOT_META):
                    names.add(name[len(DOT_WHITEOUT) :])
        finally:
            os.close(fd)
        return names

    def _replaces(self, node: Node, below: Node | None) -> bool:
        """Whether a directory shows something else of the lower layers than what is at its path there."""
        if node.kind != stat.S_IFDIR:
            return False
        # The upper layer is the first of the merged stack's.
        merged = [_place(real) for real in node.lowers if real.layer.index > 1]
        expected = [_place(real) for real in below.lowers] if below is not None and below.kind == stat.S_IFDIR else []
        return merged != expected


def _place(real: Real) -> tuple[bytes, bytes]:
    return real.layer.path, real.path()
