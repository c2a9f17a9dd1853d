"""Open files: reading and writing what a node's data is at the moment, whatever it was when the file was opened."""

from __future__ import annotations

import errno
import fcntl
import math
import os

from overlayfs_py.config import MS_NOATIME
from overlayfs_py.core import copyup, objects, owners, protection
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.requests import InGroup, Job, Steps, awaited
from overlayfs_py.records import TYPE_CHECKING, OrderedDict
from overlayfs_py.sys import files as sys_files
from overlayfs_py.sys import paths
from overlayfs_py.sys.paths import fd_path

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

_PIECE = 64 << 20  # bytes copied before a look whether that is still wanted
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE, fallocate(2)


class File:
    """A file that a process has open. Its descriptor is the node's, so that all see the same data.

    `noatime` says that reading through it sets no access time (O_NOATIME).
    """

    __slots__ = ("noatime", "node")

    def __init__(self, node: Node, *, noatime: bool = False) -> None:
        self.node = node
        self.noatime = noatime


class Backing:
    """A descriptor of a node's data, open for reading or for both; closed when nobody holds this object any more.

    The cache may let go of it while a request still reads. Where `append` is set the file may only grow (chattr(1)),
    and whatever is written goes to its end.
    """

    __slots__ = ("append", "fd", "write")

    def __init__(self, fd: int, *, write: bool, append: bool = False) -> None:
        self.fd = fd
        self.write = write
        self.append = append

    def __del__(self) -> None:
        os.close(self.fd)


class FileCache:
    """One descriptor per node whose data is in use, at most `limit`, least recently used ones closed first.

    A closed one is opened again on demand. Where the daemon could not do that, as the file's mode forbids it, the
    descriptor stays until the last handle goes.
    """

    __slots__ = ("entries", "fs", "keeps", "kept", "limit")

    def __init__(self, fs: Overlay, limit: int) -> None:
        self.fs = fs
        self.limit = limit
        self.entries: OrderedDict[Node, Backing] = OrderedDict()
        self.kept: dict[Node, Backing] = {}
        self.keeps = os.geteuid() != 0

    def fd(self, node: Node, *, write: bool) -> int:
        """A descriptor of the node's data, good until the next call."""
        return self.held(node, write=write).fd

    def held(self, node: Node, *, write: bool) -> Backing:
        """The node's data, good for as long as the result is held."""
        held = self.entries.get(node) or self.kept.get(node)
        if held is not None and (held.write or not write) and not self._replaced(node, held):
            if node in self.entries:
                self.entries.move_to_end(node)
            return held
        if not write:
            return self.adopt(node, self._open(node, os.O_RDONLY), write=False)
        protection.check(self.fs, node, protection.IMMUTABLE)
        if protection.of(self.fs, node):
            return self.adopt(node, self._open(node, os.O_RDWR | os.O_APPEND), write=True, append=True)
        return self.adopt(node, self._open(node, os.O_RDWR), write=True)

    def _replaced(self, node: Node, held: Backing) -> bool:
        """Whether a lower file is another by now, which only a mount with a timeout is to notice."""
        if self.fs.config.timeout == math.inf or node.upper is not None:
            return False
        try:
            now = objects.stat_real(self.fs, node.lowers[-1])
        except (FileNotFoundError, NotADirectoryError):
            # gone, but still open
            return False
        then = os.fstat(held.fd)
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)

    def adopt(self, node: Node, fd: int, *, write: bool, append: bool = False) -> Backing:
        """Take over a descriptor of the node's data in place of the one there is."""
        self.drop(node)
        backing = Backing(fd, write=write, append=append)
        if self.keeps and node.opens:
            self.kept[node] = backing
            return backing
        self.entries[node] = backing
        if len(self.entries) > self.limit:
            self.entries.popitem(last=False)
        return backing

    def _open(self, node: Node, flags: int) -> int:
        if node.metacopy:
            return objects.open_file(self.fs, node.lowers[-1], flags)
        if node.pinned >= 0:
            return os.open(fd_path(node.pinned), flags | os.O_CLOEXEC)
        return objects.open_file(self.fs, node.upper or node.lowers[-1], flags)

    def drop(self, node: Node) -> None:
        """Let go of a node whose data has moved, or that nobody uses any more."""
        self.entries.pop(node, None)
        self.kept.pop(node, None)

    def close(self) -> None:
        self.entries.clear()
        self.kept.clear()


def open_file(fs: Overlay, node: Node, flags: int) -> Steps[File]:
    """Open a regular file with the flags of open(2); writing copies it up first. O_TRUNC is obeyed.

    Raises EROFS in a mount that changes nothing, and what copying up raises.
    """
    noatime = bool(flags & os.O_NOATIME) and not fs.config.mount_flags & MS_NOATIME
    file = File(node, noatime=noatime)
    if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
        fs.writable()
        appends = flags & os.O_APPEND and not flags & os.O_TRUNC
        protection.check(fs, node, protection.IMMUTABLE if appends else protection.BOTH)
        truncated = yield from copyup.copy_up(fs, node, size=0 if flags & os.O_TRUNC else None)
        backing = fs.files.held(node, write=True)
        if flags & os.O_TRUNC and not truncated:
            os.ftruncate(backing.fd, 0)
    else:
        fs.files.fd(node, write=False)
    node.opens += 1
    return file


def read(fs: Overlay, file: File, offset: int, size: int) -> bytes:
    """Up to `size` bytes at `offset`; fewer only at the end of the file."""
    if file.node.metacopy:
        size = min(size, max(0, _end(fs, file.node) - offset))
    fd = fs.files.fd(file.node, write=False)
    if not file.noatime:
        return os.pread(fd, size, offset)
    # The descriptor is everybody's, so it has the flag just for this.
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NOATIME)
    try:
        return os.pread(fd, size, offset)
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def write(fs: Overlay, file: File, offset: int, data: bytes) -> int:
    """Write at `offset`; the number of bytes written, all of them unless the disk is full."""
    backing = fs.files.held(file.node, write=True)
    check_growth(backing, offset)
    return os.pwrite(backing.fd, data, offset)


def check_growth(backing: Backing, offset: int) -> None:
    """Raise EPERM for a write to a file that may only grow, at any other place than its end."""
    if backing.append and offset != os.fstat(backing.fd).st_size:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def take_set_ids(fs: Overlay, fd: int, in_group: InGroup | None = None) -> bool:
    """Take set-user-id and set-group-id from an open file of the upper layer; whether it had any that a write takes."""
    cleared = owners.without_set_ids(fs, fd, in_group)
    if cleared is None:
        return False
    owners.change(fs, fd, uid=None, gid=None, mode=cleared)
    return True


def release(fs: Overlay, file: File) -> None:
    """The last descriptor of an open file is closed."""
    node = file.node
    node.opens -= 1
    if not node.opens:
        fs.files.drop(node)


def fsync(fs: Overlay, node: Node, *, data_only: bool) -> Steps[None]:
    """Bring a file to disk; nothing to do for one that is not in the upper layer, or in a volatile mount."""
    if not fs.sync or (node.upper is None and node.pinned < 0) or node.metacopy:
        return
    backing = fs.files.held(node, write=False)
    yield from sync_job(backing.fd, data_only=data_only)


def sync_job(fd: int, *, data_only: bool) -> Steps[None]:
    """Hand out the fsync(2) or fdatasync(2) of `fd` as a job, and raise what it raised."""
    yield from awaited(Job(lambda: (os.fdatasync if data_only else os.fsync)(fd)))


def fsync_dir(fs: Overlay, node: Node, *, data_only: bool) -> Steps[None]:
    """As fsync, for a directory."""
    if not fs.sync or node.upper is None:
        return
    fd = paths.open_dir_read(fs.dir_fd(node))
    try:
        yield from sync_job(fd, data_only=data_only)
    finally:
        os.close(fd)


def allocate(fs: Overlay, node: Node, mode: int, offset: int, length: int) -> Steps[None]:
    """fallocate(2) with its mode bits; a range of a lower file is allocated, or punched, in its copy."""
    fs.writable()
    protection.check(fs, node, protection.BOTH if mode & ~_KEEP_SIZE else protection.IMMUTABLE)
    yield from copyup.copy_up(fs, node)
    held = fs.files.held(node, write=True)
    fd = held.fd
    try:
        # A tmpfs fills what it allocates, which takes long.
        in_place = length <= copyup.IN_PLACE_BYTES
        yield from awaited(Job(lambda: sys_files.allocate(fd, mode, offset, length)), in_place=in_place)
    finally:
        # What is raised keeps this frame.
        del held


def seek(fs: Overlay, node: Node, offset: int, whence: int) -> int:
    """Where the next data or hole is (SEEK_DATA and SEEK_HOLE of lseek(2)); ENXIO past the end."""
    fd = fs.files.fd(node, write=False)
    if not node.metacopy:
        return os.lseek(fd, offset, whence)
    end = _end(fs, node)
    found = os.lseek(fd, offset, whence) if offset < end else end
    if found >= end and (whence == os.SEEK_DATA or offset >= end):
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return min(found, end)


def _end(fs: Overlay, node: Node) -> int:
    """The size of a metacopy, which is its own; the lower file may hold more, after a truncation that a crash has cut
    short."""
    return objects.stat_node(fs, node).st_size


def copy_range(
    fs: Overlay, source: Node, source_offset: int, target: Node, target_offset: int, length: int
) -> Steps[int]:
    """copy_file_range(2) from one file of the mount to another: the number of bytes copied, 0 at the end of the source.

    Raises what that raises; EXDEV where the two files' layers can't do it, and the caller then copies by hand.
    """
    fs.writable()
    protection.check(fs, target, protection.IMMUTABLE)
    yield from copyup.copy_up(fs, target)
    if source.metacopy:
        length = min(length, max(0, _end(fs, source) - source_offset))
    reading, writing = fs.files.held(source, write=False), fs.files.held(target, write=True)
    from_fd, to_fd = reading.fd, writing.fd
    copied = 0

    def run() -> None:
        nonlocal copied
        while copied < length:
            if job.unwanted():
                raise OSError(errno.EINTR, os.strerror(errno.EINTR))
            at, to = source_offset + copied, target_offset + copied
            try:
                count = os.copy_file_range(from_fd, to_fd, min(length - copied, _PIECE), at, to)
            except OSError:
                if copied:
                    # What was copied before counts, as with write(2); the next call meets the error again.
                    return
                raise
            if count == 0:
                return
            copied += count

    job = Job(run)
    available = min(length, os.fstat(from_fd).st_size - source_offset)
    yield from awaited(job, in_place=available <= copyup.IN_PLACE_BYTES)
    return copied


def sync_fs(fs: Overlay) -> Steps[None]:
    """Bring all of the upper layer to disk (syncfs(2)), unless the mount is volatile."""
    if not fs.sync or fs.upper is None:
        return
    fd = paths.open_dir_read(fs.upper.fd)
    try:
        yield from awaited(Job(lambda: sys_files.sync_filesystem(fd)))
    finally:
        os.close(fd)
