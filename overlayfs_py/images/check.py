"""Marks in layers that make no sense, found and mended; and one style of marks turned into the other.

The kernel's marks and the AUFS-style ones (`.wh.NAME`, `.wh..wh..opq`) are both understood. Layers are changed in
place, so nothing may be mounted of them. Source: Documentation/filesystems/overlayfs.rst; fsck.overlay(8).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from overlayfs_py.core import lookup
from overlayfs_py.core.marks import DOT_META, DOT_OPAQUE, DOT_WHITEOUT, is_whiteout
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.errors import LayerError
from overlayfs_py.images.model import ImageError
from overlayfs_py.images.stack import config_of
from overlayfs_py.images.trees import remove_tree
from overlayfs_py.sys import files, locking, paths, xattrs

Kind = Literal[
    "whiteout of nothing", "redirect to nothing", "metacopy without data", "whiteout that is not seen", "left-over work"
]


class Finding(NamedTuple):
    """A mark that makes no sense; `path` is relative to the layer, `mended` whether it makes sense now."""

    layer: Path
    path: bytes
    kind: Kind
    mended: bool


def check(layers: Sequence[Path], *, userxattr: bool = False, repair: bool = False) -> Iterator[Finding]:
    """Look at each of the layers, topmost first, on those below it.

    A whiteout of nothing is removed; a directory with a redirect to nothing becomes opaque, which shows what it has
    shown; a whiteout that the kernel does not see gets what it looks for. A metacopy without data can't be mended.
    Raises ImageError.
    """
    with tempfile.TemporaryDirectory() as nothing:
        for at, layer in enumerate(layers):
            below = [*layers[at + 1 :], Path(nothing)]
            try:
                with _Checker(layer, below, userxattr=userxattr, repair=repair) as checker:
                    yield from checker.findings()
            except OSError as error:
                raise ImageError(f"cannot check {layer}: {error.strerror}") from error


def check_work(work: Path, *, repair: bool = False) -> Iterator[Finding]:
    """What a mount has left in its work directory; nothing while one holds it. Raises ImageError."""
    try:
        fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not locking.try_lock_dir(fd):
                raise ImageError(f"{work} is the work directory of a mount")
            with contextlib.suppress(FileNotFoundError):
                inner = paths.open_dir_read(fd, b"work")
                try:
                    for name, _, _ in sorted(files.list_dir(inner)):
                        if repair:
                            remove_tree(inner, name)
                        yield Finding(work, b"work/" + name, "left-over work", repair)
                finally:
                    os.close(inner)
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"cannot check {work}: {error.strerror}") from error


class _Checker:
    """One layer as the upper layer of those below it, and its own directory to mend it in."""

    def __init__(self, layer: Path, below: Sequence[Path], *, userxattr: bool, repair: bool) -> None:
        self.layer = layer
        self.repair = repair
        config = config_of(below, userxattr=userxattr)._replace(
            upperdir=os.fsencode(layer.absolute()),
            workdir=os.fsencode(below[-1].absolute()),
        )
        try:
            self.fs = Overlay.open(config)
        except LayerError as error:
            raise ImageError(str(error)) from error
        self.root = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> _Checker:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.root)
        self.fs.close()

    def findings(self) -> Iterator[Finding]:
        pending: list[tuple[bytes, Node]] = [(b"", self.fs.root)]
        while pending:
            path, node = pending.pop()
            with _directory(self.root, path) as fd:
                for name, _, _ in sorted(files.list_dir(fd)):
                    below = path + b"/" + name if path else name
                    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    kind = self._judge(fd, node, name, st)
                    if kind is not None:
                        yield Finding(self.layer, below, kind, self.repair and self._mend(fd, node, name, kind))
                    if stat.S_ISDIR(st.st_mode):
                        child = self._child(node, name)
                        if child is not None:
                            pending.append((below, child))

    def _child(self, node: Node, name: bytes) -> Node | None:
        try:
            return lookup.lookup(self.fs, node, name)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOENT):
                raise
            # a redirect that is no path, told already; or a directory with the name of a mark
            return None

    def _judge(self, fd: int, node: Node, name: bytes, st: os.stat_result) -> Kind | None:
        """What is wrong with one entry of the layer's directory `fd`, which is `node` in the merged tree."""
        hidden = self._hidden_name(fd, name, st)
        if hidden is not None:
            if name == DOT_OPAQUE:
                return None
            if stat.S_ISREG(st.st_mode) and hidden == name and not self._sees_xattr_whiteouts(fd):
                return "whiteout that is not seen"
            return None if lookup.lower_positive(self.fs, node, hidden) else "whiteout of nothing"
        if stat.S_ISDIR(st.st_mode):
            with _directory(fd, name) as child_fd:
                own = self.fs.marks.read_dir(child_fd)
            if own.redirect is None or own.opaque:
                return None
            child = self._child(node, name)
            return "redirect to nothing" if child is None or not child.lowers else None
        if stat.S_ISREG(st.st_mode) and self.fs.marks.read_file(fd, name).metacopy:
            try:
                lookup.find(self.fs, node, name)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return "metacopy without data"
        return None

    def _hidden_name(self, fd: int, name: bytes, st: os.stat_result) -> bytes | None:
        """The name that a whiteout of any style hides; None for what is none."""
        if is_whiteout(st):
            return name
        if not stat.S_ISREG(st.st_mode):
            return None
        if name.startswith(DOT_WHITEOUT) and not self.fs.marks.is_literal(fd, name):
            return name if name.startswith(DOT_META) else name[len(DOT_WHITEOUT) :]
        return name if not st.st_size and self.fs.marks.is_xattr_whiteout(fd, name) else None

    def _sees_xattr_whiteouts(self, fd: int) -> bool:
        marks = self.fs.marks
        return marks.read_dir(fd).xattr_whiteouts and marks.read_dir(self.root).xattr_whiteouts

    def _mend(self, fd: int, node: Node, name: bytes, kind: Kind) -> bool:
        marks = self.fs.marks
        with _times_kept(fd):
            if kind == "whiteout of nothing":
                os.unlink(name, dir_fd=fd)
            elif kind == "redirect to nothing":
                # Opaque first: without the redirect it would merge with what has its name below.
                xattrs.set(fd, name, marks.opaque, b"y")
                xattrs.remove(fd, name, marks.redirect)
            elif kind == "whiteout that is not seen":
                for holder in (fd, self.root):
                    if not marks.read_dir(holder).opaque:
                        xattrs.fset(holder, marks.opaque, b"x")
            else:
                return False
        return True


@contextlib.contextmanager
def _directory(root: int, path: bytes) -> Iterator[int]:
    fd = paths.open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _times_kept(fd: int) -> Iterator[None]:
    """Whatever is done in a directory meanwhile, its times are those of before."""
    before = os.fstat(fd)
    try:
        yield
    finally:
        os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
