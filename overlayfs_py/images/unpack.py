"""Unpacking a layer's archive into a directory, and nowhere else, with its whiteouts as the overlay's own marks.

It takes two steps. `extract` needs the archive alone, so that all layers of an image are extracted at once. `settle`
looks at the layers below: a whiteout that hides nothing is not made, and a directory that the archive names only in the
path of others is as it is below. Source: the OCI image specification, layer.md.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from overlayfs_py.core.marks import DOT_META, DOT_OPAQUE, DOT_WHITEOUT, FOREIGN_PREFIX, WHITEOUT_DEVICE, Marks
from overlayfs_py.images.archive import Attributes, Entry, entries, shown
from overlayfs_py.images.model import ImageError
from overlayfs_py.images.streams import Source, TarSource
from overlayfs_py.images.trees import remove_tree, temporary_name
from overlayfs_py.sys import files, paths, xattrs
from overlayfs_py.sys.rename import renameat2

_OPEN_DIRS: Final = 64
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HOST_XATTRS: Final = frozenset((b"security.selinux",))
"""Xattrs that say something of the machine they were made on, and nothing here."""


@dataclass(slots=True)
class Extracted:
    """What is left to do once a layer's objects are there; all paths are relative, the root is b"".

    `dirs` are the attributes of the directories that have an entry, `implied` those without, `whiteouts` the names to
    hide and `opaque` the directories to hide the lower parts of. `skipped` are devices that can't be made here,
    `covering` the directories without an entry that are something else below, `disowned` how many entries are root's
    that were another's.
    """

    diff_id: str = ""
    dirs: dict[bytes, Attributes] = field(default_factory=dict)
    implied: set[bytes] = field(default_factory=set)
    whiteouts: set[bytes] = field(default_factory=set)
    opaque: set[bytes] = field(default_factory=set)
    skipped: list[bytes] = field(default_factory=list)
    covering: list[bytes] = field(default_factory=list)
    disowned: int = 0


def extract(archive: Source, target: Path, *, userxattr: bool, one_owner: bool = False) -> Extracted:
    """Make the objects of an archive, compressed or not, in the empty directory `target`; with `one_owner` all root's.

    The directory that `target` is in must be ours alone: what later entries replace is taken apart there.
    Raises ImageError for an archive that is damaged, or whose entries can't be made as they are.
    """
    trash = os.open(target.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    extractor = _Extractor(root, trash, Marks(user=userxattr))
    path = b""
    try:
        with TarSource(archive) as source:
            for entry in entries(source):
                path = entry.path
                if one_owner and entry.format:
                    extractor.disown(entry.attributes)
                extractor.add(entry, source)
            path = b""
            extractor.done.diff_id = source.finish()
    except OSError as error:
        raise ImageError(f"cannot unpack {shown(path) or 'the layer'}: {error.strerror}") from error
    finally:
        extractor.close()
        os.close(root)
        os.close(trash)
    return extractor.done


class _Extractor:
    """Makes entries below one directory. Nothing resolves through a symbolic link, the archive's own included."""

    __slots__ = ("done", "marks", "open_dirs", "root", "trash", "user")

    def __init__(self, root: int, trash: int, marks: Marks) -> None:
        self.root = root
        self.trash = trash
        self.marks = marks
        self.user = marks.prefix.startswith(b"user.")
        self.open_dirs: OrderedDict[bytes, int] = OrderedDict()
        self.done = Extracted(implied={b""})

    def close(self) -> None:
        for fd in self.open_dirs.values():
            os.close(fd)
        self.open_dirs.clear()

    def disown(self, attributes: Attributes) -> None:
        """Make root the owner."""
        if (attributes.uid, attributes.gid) != (0, 0):
            attributes.uid = attributes.gid = 0
            self.done.disowned += 1

    def add(self, entry: Entry, source: TarSource) -> None:
        path = entry.path
        if not path:
            if entry.format != stat.S_IFDIR:
                raise ImageError("the root of the layer is no directory")
            self._set_dir(path, entry)
            return
        parent, _, name = path.rpartition(b"/")
        if DOT_WHITEOUT in path and self._take_mark(path, parent, name):
            return
        dir_fd = self.directory(parent)
        if entry.format == stat.S_IFREG:
            self._file(dir_fd, path, name, entry, source)
        elif entry.format == stat.S_IFDIR:
            self._directory(dir_fd, path, name)
            self._set_dir(path, entry)
        else:
            self._other(dir_fd, path, name, entry)

    def _take_mark(self, path: bytes, parent: bytes, name: bytes) -> bool:
        """Whether the entry is a whiteout or other AUFS-style mark, which is noted then."""
        if any(part.startswith(DOT_META) for part in parent.split(b"/")):
            # AUFS's own directories, of which layers made with it may have some.
            return True
        if any(part.startswith(DOT_WHITEOUT) for part in parent.split(b"/")):
            raise ImageError(f"{shown(path)} is in a whiteout, which is no directory")
        if not name.startswith(DOT_WHITEOUT):
            return False
        if name == DOT_OPAQUE:
            self.directory(parent)
            self.done.opaque.add(parent)
        elif not name.startswith(DOT_META):
            hidden = name[len(DOT_WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise ImageError(f"{shown(path)} is a whiteout of no name")
            self.done.whiteouts.add(parent + b"/" + hidden if parent else hidden)
        return True

    def directory(self, path: bytes) -> int:
        """A descriptor of the directory at `path`, made if it isn't there, good until the next call."""
        if not path:
            return self.root
        fd = self.open_dirs.get(path)
        if fd is not None:
            self.open_dirs.move_to_end(path)
            return fd
        try:
            fd = paths.open_beneath(self.root, path, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            fd = self._imply(path)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise ImageError(f"the archive has something in {shown(path)}, which is no directory in it") from error
        self.open_dirs[path] = fd
        if len(self.open_dirs) > _OPEN_DIRS:
            os.close(self.open_dirs.popitem(last=False)[1])
        return fd

    def _imply(self, path: bytes) -> int:
        """Make a directory that has had no entry so far."""
        parent, _, name = path.rpartition(b"/")
        parent_fd = self.directory(parent)
        os.mkdir(name, 0o700, dir_fd=parent_fd)
        self.done.implied.add(path)
        return paths.open_dir_at(parent_fd, name)

    def _directory(self, dir_fd: int, path: bytes, name: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                return
            os.unlink(name, dir_fd=dir_fd)
            os.mkdir(name, 0o700, dir_fd=dir_fd)
            # What was below had gone with the entry that is replaced.
            self.done.opaque.add(path)

    def _set_dir(self, path: bytes, entry: Entry) -> None:
        """Keep a directory's attributes: they are set when nothing in it changes any more."""
        self.done.implied.discard(path)
        self.done.dirs[path] = entry.attributes

    def _make_room(self, dir_fd: int, path: bytes, name: bytes) -> None:
        """Remove what an earlier entry of the same path has made."""
        try:
            os.unlink(name, dir_fd=dir_fd)
        except IsADirectoryError:
            self._forget(path)
            trash = temporary_name()
            renameat2(dir_fd, name, self.trash, trash)
            remove_tree(self.trash, trash)

    def _forget(self, path: bytes) -> None:
        below = path + b"/"
        for known in [known for known in self.open_dirs if known == path or known.startswith(below)]:
            os.close(self.open_dirs.pop(known))
        done = self.done
        for known in [known for known in done.dirs if known == path or known.startswith(below)]:
            del done.dirs[known]
        for noted in (done.implied, done.whiteouts, done.opaque):
            noted.difference_update([known for known in noted if known == path or known.startswith(below)])

    def _file(self, dir_fd: int, path: bytes, name: bytes, entry: Entry, source: TarSource) -> None:
        try:
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=dir_fd)
        except FileExistsError:
            self._make_room(dir_fd, path, name)
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=dir_fd)
        try:
            at = 0
            for offset, length in entry.segments:
                if offset != at:
                    os.lseek(fd, offset, os.SEEK_SET)
                at = offset + length
                self._copy(fd, source, length, path)
            if at != entry.size:
                os.ftruncate(fd, entry.size)
            attributes = entry.attributes
            os.fchown(fd, attributes.uid, attributes.gid)
            os.fchmod(fd, attributes.mode)
            for key, value in attributes.xattrs:
                if (shown_key := self._xattr(key)) is not None:
                    xattrs.fset(fd, shown_key, value)
            os.utime(fd, ns=(attributes.atime_ns, attributes.mtime_ns))
        finally:
            os.close(fd)

    @staticmethod
    def _copy(fd: int, source: TarSource, length: int, path: bytes) -> None:
        for piece in source.pieces(length):
            length -= len(piece)
            written = os.write(fd, piece)
            while written < len(piece):
                written += os.write(fd, memoryview(piece)[written:])
        if length:
            raise ImageError(f"the archive ends within {shown(path)}")

    def _other(self, dir_fd: int, path: bytes, name: bytes, entry: Entry) -> None:
        """A hard link, symbolic link, device or FIFO."""
        if entry.format == 0 and entry.target == path:
            raise ImageError(f"{shown(path)} is a hard link to itself")
        try:
            made = self._make(dir_fd, name, entry)
        except FileExistsError:
            self._make_room(dir_fd, path, name)
            made = self._make(dir_fd, name, entry)
        if not made:
            self.done.skipped.append(path)
        elif entry.format:
            self._set(dir_fd, name, entry)

    def _make(self, dir_fd: int, name: bytes, entry: Entry) -> bool:
        if entry.format == 0:
            self._link(dir_fd, name, entry)
        elif entry.format == stat.S_IFLNK:
            os.symlink(entry.target, name, dir_fd=dir_fd)
        elif entry.format == stat.S_IFCHR and entry.rdev == WHITEOUT_DEVICE:
            raise ImageError(f"{shown(entry.path)} is a device 0/0, which no overlay can show")
        else:
            try:
                files.make_node(dir_fd, name, entry.format | 0o600, entry.rdev)
            except PermissionError:
                if not self.user or entry.format == stat.S_IFIFO:
                    raise
                # a user namespace makes no devices
                return False
        return True

    def _link(self, dir_fd: int, name: bytes, entry: Entry) -> None:
        parent, _, target = entry.target.rpartition(b"/")
        try:
            if not target:
                raise FileNotFoundError
            source_fd = paths.open_beneath(self.root, parent, os.O_PATH | os.O_DIRECTORY) if parent else self.root
        except OSError as error:
            if error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            raise _dangling(entry) from error
        try:
            os.link(target, name, src_dir_fd=source_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise _dangling(entry) from error
        finally:
            if source_fd != self.root:
                os.close(source_fd)

    def _set(self, dir_fd: int, name: bytes, entry: Entry) -> None:
        attributes = entry.attributes
        files.chown_at(dir_fd, name, attributes.uid, attributes.gid)
        if entry.format != stat.S_IFLNK:
            files.chmod_at(dir_fd, name, attributes.mode)
        for key, value in attributes.xattrs:
            if (shown_key := self._xattr(key)) is not None:
                xattrs.set(dir_fd, name, shown_key, value)
        os.utime(name, ns=(attributes.atime_ns, attributes.mtime_ns), dir_fd=dir_fd, follow_symlinks=False)

    def _xattr(self, key: bytes) -> bytes | None:
        return xattr_on_disk(self.marks, key)


def xattr_on_disk(marks: Marks, key: bytes) -> bytes | None:
    """What an xattr of an archive is called in a layer, so that it is never a mark there; None where it is left out."""
    if key in _HOST_XATTRS or key.startswith(FOREIGN_PREFIX):
        return None
    if key.startswith(b"trusted.") and marks.prefix.startswith(b"user."):
        # a user namespace has none
        return None
    return marks.to_disk(key)


def _dangling(entry: Entry) -> ImageError:
    return ImageError(f"{shown(entry.path)} is a hard link to {shown(entry.target)}, which the layer does not have")
