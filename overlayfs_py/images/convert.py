"""A layer's marks turned from the kernel's into AUFS-style ones, and back, in place.

Each new mark is there before the old one goes, so that a kill leaves a layer that shows the same. Source: the OCI image
specification, layer.md; Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from overlayfs_py.core.lookup import NAME_MAX
from overlayfs_py.core.marks import DOT_META, DOT_OPAQUE, DOT_WHITEOUT, FOREIGN_OPAQUE, Marks, is_whiteout
from overlayfs_py.images.archive import shown
from overlayfs_py.images.model import ImageError
from overlayfs_py.images.trees import put_whiteout
from overlayfs_py.sys import files, paths, xattrs

Style = Literal["kernel", "aufs"]


def convert(layer: Path, style: Style, *, userxattr: bool = False) -> int:
    """Give all marks of a layer one style; how many were of the other.

    Raises ImageError; where the layer has marks that AUFS's style can't say, nothing is changed.
    """
    try:
        root = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            converter = _Converter(root, Marks(user=userxattr))
            if style == "kernel":
                return sum(converter.to_kernel(path, fd) for path, fd in converter.directories())
            for path, fd in converter.directories():
                converter.refuse_unspeakable(path, fd)
            return sum(converter.to_aufs(fd) for _, fd in converter.directories())
        finally:
            os.close(root)
    except OSError as error:
        raise ImageError(f"cannot convert {layer}: {error.strerror}") from error


class _Converter:
    __slots__ = ("marks", "root")

    def __init__(self, root: int, marks: Marks) -> None:
        self.root = root
        self.marks = marks

    def directories(self) -> Iterator[tuple[bytes, int]]:
        """Every directory of the layer, parents first, with a descriptor that is good until the next."""
        pending = [b""]
        while pending:
            path = pending.pop()
            fd = paths.open_beneath(self.root, path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                before = os.fstat(fd)
                yield path, fd
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
                for name, _, _ in sorted(files.list_dir(fd), reverse=True):
                    if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                        pending.append(path + b"/" + name if path else name)
            finally:
                os.close(fd)

    def to_kernel(self, path: bytes, fd: int) -> int:
        count = 0
        for name, _, _ in files.list_dir(fd):
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if not name.startswith(DOT_WHITEOUT) or not stat.S_ISREG(st.st_mode) or self.marks.is_literal(fd, name):
                continue
            if name == DOT_OPAQUE:
                xattrs.fset(fd, self.marks.opaque, b"y")
            elif not name.startswith(DOT_META):
                self._hide(path, fd, name[len(DOT_WHITEOUT) :])
            os.unlink(name, dir_fd=fd)
            count += 1
        if _has(fd, FOREIGN_OPAQUE):
            if xattrs.fget(fd, FOREIGN_OPAQUE) == b"y":
                xattrs.fset(fd, self.marks.opaque, b"y")
            xattrs.fremove(fd, FOREIGN_OPAQUE)
            count += 1
        return count

    def _hide(self, path: bytes, fd: int, name: bytes) -> None:
        if name in (b"", b".", b".."):
            raise ImageError(f"{shown(path)} has a whiteout of no name")
        try:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            put_whiteout(self.root, fd, name, self.marks)
            return
        # What is beside the mark is shown, and hides what is below but for what a directory would merge with.
        if stat.S_ISDIR(st.st_mode):
            xattrs.set(fd, name, self.marks.opaque, b"y")

    def refuse_unspeakable(self, path: bytes, fd: int) -> None:
        marks = self.marks
        where = shown(path) or "the root of the layer"
        if _has(fd, marks.redirect):
            raise ImageError(f"{where} has a redirect, which AUFS-style marks can't say")
        for name, _, _ in files.list_dir(fd):
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISREG(st.st_mode) and marks.read_file(fd, name).metacopy:
                raise ImageError(f"{shown(name)} in {where} is a metacopy, which AUFS-style marks can't say")
            if self._is_whiteout(fd, name, st) and len(DOT_WHITEOUT + name) > NAME_MAX:
                raise ImageError(f"{shown(name)} in {where} has a name too long for an AUFS-style whiteout")
            if name.startswith(DOT_WHITEOUT) and (not stat.S_ISREG(st.st_mode) or marks.is_literal(fd, name)):
                raise ImageError(f"{shown(name)} in {where} is no mark, and would be taken for one")

    def _is_whiteout(self, fd: int, name: bytes, st: os.stat_result) -> bool:
        if is_whiteout(st):
            return True
        return stat.S_ISREG(st.st_mode) and not st.st_size and self.marks.is_xattr_whiteout(fd, name)

    def to_aufs(self, fd: int) -> int:
        count = 0
        for name, _, _ in files.list_dir(fd):
            if self._is_whiteout(fd, name, os.stat(name, dir_fd=fd, follow_symlinks=False)):
                _touch(fd, DOT_WHITEOUT + name)
                os.unlink(name, dir_fd=fd)
                count += 1
        opaque = self.marks.opaque
        if _has(fd, opaque):
            # The value x is but a hint to look for xattr whiteouts, of which there are none any more.
            if xattrs.fget(fd, opaque) == b"y":
                _touch(fd, DOT_OPAQUE)
                count += 1
            xattrs.fremove(fd, opaque)
        return count


def _has(fd: int, key: bytes) -> bool:
    try:
        return key in xattrs.flist(fd)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # a filesystem without xattrs has no such marks
        return False


def _touch(fd: int, name: bytes) -> None:
    with contextlib.suppress(FileExistsError):
        # What an earlier run, which was killed, has left serves.
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd))
