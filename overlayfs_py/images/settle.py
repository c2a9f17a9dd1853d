"""The second step of unpacking a layer, for which the layers below it must be there.

What archives say of lower layers is turned into the overlay's own marks, where there is something below to say it of:
the kernel lists a whiteout in a directory that merges with nothing. Source: the OCI image specification, layer.md,
"Whiteouts"; Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from overlayfs_py.core.marks import Marks
from overlayfs_py.images.archive import Attributes, shown
from overlayfs_py.images.model import ImageError
from overlayfs_py.images.stack import Stack, open_stack
from overlayfs_py.images.trees import put_whiteout
from overlayfs_py.images.unpack import Extracted, xattr_on_disk
from overlayfs_py.sys import paths, xattrs

_UNNAMED_DIR: Final = Attributes(0o755, 0, 0, 0, 0)
"""A directory that only the paths of others name, in no layer."""


def settle(target: Path, extracted: Extracted, below: Sequence[Path], *, userxattr: bool) -> None:
    """Mark the layer extracted to `target`, and give its directories their attributes.

    `below` are the finished layers that it lies on, topmost first. Raises ImageError.
    """
    root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    settler = _Settler(root, Marks(user=userxattr), extracted)
    try:
        if below:
            with open_stack(below, userxattr=userxattr) as stack:
                settler.mark(stack)
        settler.finish()
    except OSError as error:
        raise ImageError(f"cannot unpack {shown(settler.at) or 'the layer'}: {error.strerror}") from error
    finally:
        os.close(root)


class _Settler:
    __slots__ = ("at", "extracted", "marks", "root")

    def __init__(self, root: int, marks: Marks, extracted: Extracted) -> None:
        self.root = root
        self.marks = marks
        self.extracted = extracted
        self.at = b""

    def mark(self, below: Stack) -> None:
        extracted = self.extracted
        hidden = set(extracted.whiteouts)
        if b"" in extracted.opaque:
            # The kernel merges the roots of all layers, whatever their marks.
            extracted.opaque.remove(b"")
            hidden.update(below.names(below.root))
        # Parents first: what is in a directory that is hidden is hidden with it.
        for path in sorted(hidden):
            self.at = path
            if not self._cut_off(path) and below.find(path) is not None:
                self._hide(path)
        for path in sorted(extracted.implied):
            self.at = path
            if self._cut_off(path) or path in hidden:
                continue
            node = below.find(path)
            if node is None:
                continue
            if node.kind == stat.S_IFDIR:
                extracted.implied.remove(path)
                extracted.dirs[path] = below.attributes(node)
            else:
                extracted.covering.append(path)
        for path in sorted(extracted.opaque):
            self.at = path
            if not self._cut_off(path):
                self._make_opaque(path)

    def _cut_off(self, path: bytes) -> bool:
        """Whether an opaque directory above hides all there is below of this path."""
        at = path.rfind(b"/")
        while at > 0:
            if path[:at] in self.extracted.opaque:
                return True
            at = path.rfind(b"/", 0, at)
        return False

    def _hide(self, path: bytes) -> None:
        parent, _, name = path.rpartition(b"/")
        try:
            dir_fd = self._directory(parent)
        except NotADirectoryError:
            # the layer has something else than a directory there, or hides it
            return
        try:
            try:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                put_whiteout(self.root, dir_fd, name, self.marks)
                return
            if stat.S_ISDIR(st.st_mode):
                self.extracted.opaque.add(path)
        finally:
            os.close(dir_fd)

    def _directory(self, path: bytes) -> int:
        """A new descriptor of the layer's directory at `path`, which is made where there is none."""
        fd = os.dup(self.root)
        made = b""
        for name in path.split(b"/") if path else ():
            made = made + b"/" + name if made else name
            try:
                try:
                    below = paths.open_dir_at(fd, name)
                except FileNotFoundError:
                    os.mkdir(name, 0o700, dir_fd=fd)
                    self.extracted.implied.add(made)
                    below = paths.open_dir_at(fd, name)
            finally:
                os.close(fd)
            fd = below
        return fd

    def _make_opaque(self, path: bytes) -> None:
        fd = paths.open_beneath(self.root, path, os.O_PATH | os.O_DIRECTORY)
        try:
            xattrs.fset(fd, self.marks.opaque, b"y")
        finally:
            os.close(fd)

    def finish(self) -> None:
        """Set what making other objects changes: the attributes of directories, deepest first."""
        attributes = dict.fromkeys(self.extracted.implied, _UNNAMED_DIR) | self.extracted.dirs
        for path in sorted(attributes, reverse=True):
            self.at = path
            fd = paths.open_beneath(self.root, path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._set(fd, attributes[path])
            finally:
                os.close(fd)

    def _set(self, fd: int, attributes: Attributes) -> None:
        os.fchown(fd, attributes.uid, attributes.gid)
        os.fchmod(fd, attributes.mode)
        for key, value in attributes.xattrs:
            name = xattr_on_disk(self.marks, key)
            if name is not None:
                xattrs.fset(fd, name, value)
        os.utime(fd, ns=(attributes.atime_ns, attributes.mtime_ns))
