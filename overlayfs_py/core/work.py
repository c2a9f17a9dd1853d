"""The work directory: where every object is built before one link or rename makes it visible.

Its layout is the kernel's: `work/` for objects being built, `index/` for hard links. What a crash leaves in `work/` is
cleared by the next mount.
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core.layers import Layer, open_lower
from overlayfs_py.core.marks import WHITEOUT_DEVICE, Marks
from overlayfs_py.errors import LayerError
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import files, locking, paths, xattrs
from overlayfs_py.sys.rename import RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2

if TYPE_CHECKING:
    from typing import Literal

    WhiteoutStyle = Literal["device", "xattr"]

log = Journal(__name__)


class Staged:
    """An object being built in the work directory: published by one call, gone if never published.

    `fd` refers to it: opened for reading and writing where it is a regular file, else O_PATH. `at` is what calls that
    take a path or an open file take for it.
    """

    __slots__ = ("at", "fd", "name", "work")

    def __init__(self, work: Work, fd: int, name: bytes | None, *, opened: bool) -> None:
        self.work = work
        self.fd = fd
        self.at = fd if opened else paths.fd_path(fd)
        self.name = name

    def link(self, dir_fd: int, name: bytes) -> None:
        """Give it a further name, one that must be free."""
        if self.name is None:
            files.link_fd(self.fd, dir_fd, name)
        else:
            os.link(self.name, name, src_dir_fd=self.work.fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def publish(self, dir_fd: int, name: bytes, *, replace: bool = False) -> None:
        """Make it visible as `name`, which must be free unless `replace` is set; then it may not be a directory."""
        if self.name is None and not replace:
            files.link_fd(self.fd, dir_fd, name)
            return
        if self.name is None:
            temporary = self.work.temporary_name()
            files.link_fd(self.fd, self.work.fd, temporary)
            self.name = temporary
        renameat2(self.work.fd, self.name, dir_fd, name, 0 if replace else RENAME_NOREPLACE)
        self.name = None

    def exchange(self, dir_fd: int, name: bytes, flags: int) -> None:
        """Rename it to `name` with `flags` of renameat2(2); what was there takes its place in the work directory."""
        assert self.name is not None
        renameat2(self.work.fd, self.name, dir_fd, name, flags)

    def detach(self) -> int:
        """Hand over the descriptor; a name it still has in the work directory goes."""
        fd, self.fd = self.fd, -1
        self.close()
        return fd

    def close(self) -> None:
        """Let go of it, and remove it if it was not published."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.name is not None:
            name, self.name = self.name, None
            self.work.discard(name)


class Work:
    """The work directory of a mount, on the filesystem of its upper layer.

    `exclusive` says whether no other mount of ours holds it; only then was it cleared, and only then is it ours.
    """

    __slots__ = (
        "counter",
        "exclusive",
        "fd",
        "lock_fd",
        "prefix",
        "rename_whiteout",
        "tmpfiles",
        "whiteout_fd",
        "whiteouts",
    )

    def __init__(self, path: bytes, root: int) -> None:
        """Lock and clear the work directory `root`, which is at `path`; LayerError where that can't be done.

        Where another mount holds it, nothing in it changes.
        """
        self.lock_fd = self.fd = -1
        self.prefix = b"#" + os.urandom(4).hex().encode() + b"-"
        self.counter = 0
        self.exclusive = False
        self.tmpfiles = False
        self.rename_whiteout = False
        self.whiteouts: WhiteoutStyle = "device"
        # The whiteout device made last, by which further ones are made as its hard links.
        self.whiteout_fd = -1
        try:
            self.lock_fd = paths.open_dir_read(root)
            self.exclusive = locking.try_lock_dir(self.lock_fd)
            _make_dir(self.lock_fd, b"work")
            self.fd = paths.open_dir_at(self.lock_fd, b"work")
            if self.exclusive:
                self._refuse_incompatible()
                self.clear()
        except OSError as error:
            self.close()
            raise LayerError(f"cannot use the work directory {os.fsdecode(path)}: {error.strerror}") from error
        except LayerError:
            self.close()
            raise

    def _refuse_incompatible(self) -> None:
        """The kernel notes features that outlive a mount in work/incompat; its volatile mounts leave one."""
        try:
            features = [name for name, _, _ in self.listing(self.fd, b"incompat")]
        except FileNotFoundError:
            return
        if features:
            raise LayerError(
                f"the upper layer was left by a kernel mount with {os.fsdecode(features[0])}: "
                "discard it, or remove work/incompat in the work directory to trust it"
            )

    def clear(self) -> None:
        """Remove what earlier mounts left half built."""
        for name, _, _ in self.listing(self.fd, b"."):
            self.remove_tree(name)

    def probe(self, marks: Marks) -> None:
        """Find out what this filesystem can do: unnamed files, whiteout devices, RENAME_WHITEOUT, xattrs.

        Raises LayerError where it can hold no xattrs of ours at all.
        """
        try:
            os.close(files.tmpfile(self.fd, 0o600))
            self.tmpfiles = True
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            # no O_TMPFILE here: named temporary files serve
        staged = self.stage_file(0o600)
        try:
            xattrs.fset(staged.fd, marks.opaque, b"n")
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            what = marks.prefix.decode()
            raise LayerError(
                f"the upper layer's filesystem cannot hold {what}* xattrs: use another one for upperdir and workdir"
            ) from error
        finally:
            staged.close()
        self._probe_whiteouts()

    def _probe_whiteouts(self) -> None:
        device, target = self.temporary_name(), self.temporary_name()
        try:
            files.make_node(self.fd, device, stat.S_IFCHR, WHITEOUT_DEVICE)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            # no device nodes here, not even 0/0: xattr whiteouts instead
            self.whiteouts = "xattr"
            return
        try:
            renameat2(self.fd, device, self.fd, target, RENAME_WHITEOUT)
            self.rename_whiteout = True
            os.unlink(target, dir_fd=self.fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            # renames that leave a whiteout take two steps here
        os.unlink(device, dir_fd=self.fd)

    def open_index(self) -> Layer:
        """The index directory, made if it isn't there."""
        _make_dir(self.lock_fd, b"index")
        return Layer(b"index", paths.open_dir_at(self.lock_fd, b"index"), 0)

    def temporary_name(self) -> bytes:
        self.counter += 1
        return self.prefix + b"%x" % self.counter

    def stage_file(self, mode: int) -> Staged:
        """A new empty regular file."""
        if self.tmpfiles:
            return Staged(self, files.tmpfile(self.fd, mode), None, opened=True)
        name = self.temporary_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return Staged(self, os.open(name, flags, mode, dir_fd=self.fd), name, opened=True)

    def stage_dir(self) -> Staged:
        """A new directory of mode 0700."""
        name = self.temporary_name()
        os.mkdir(name, 0o700, dir_fd=self.fd)
        return self._staged(name)

    def stage_symlink(self, target: bytes) -> Staged:
        name = self.temporary_name()
        os.symlink(target, name, dir_fd=self.fd)
        return self._staged(name)

    def stage_node(self, mode: int, rdev: int) -> Staged:
        """A new FIFO, socket or device."""
        name = self.temporary_name()
        files.make_node(self.fd, name, mode, rdev)
        return self._staged(name)

    def _staged(self, name: bytes) -> Staged:
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:
            self.discard(name)
            raise
        return Staged(self, fd, name, opened=False)

    def stage_whiteout(self, marks: Marks) -> Staged:
        """A whiteout as this filesystem can hold it."""
        if self.whiteouts == "device":
            return self.stage_node(stat.S_IFCHR, WHITEOUT_DEVICE)
        staged = self.stage_file(0o600)
        try:
            xattrs.fset(staged.fd, marks.whiteout, b"y")
            if staged.name is None:
                name = self.temporary_name()
                staged.link(self.fd, name)
                staged.name = name
        except OSError:
            staged.close()
            raise
        return staged

    def put_whiteout_device(self, dir_fd: int, name: bytes) -> None:
        """Make a whiteout device at a name that is free.

        It is a further name of the one made before, as in the kernel: a new inode for each costs many times as much.
        """
        if self.whiteout_fd >= 0:
            try:
                files.link_fd(self.whiteout_fd, dir_fd, name)
                return
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EMLINK, errno.EXDEV, errno.EPERM):
                    raise
                # all its names are gone, it has as many as can be, or it is another project's or not to be linked to
                os.close(self.whiteout_fd)
                self.whiteout_fd = -1
        files.make_node(dir_fd, name, stat.S_IFCHR, WHITEOUT_DEVICE)
        try:
            self.whiteout_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        except OSError:
            # The whiteout is there: without a descriptor of it the next one is made as it was.
            return

    def discard(self, name: bytes) -> None:
        """As remove_tree, for what is no part of an operation's outcome any more: a failure is noted and no more.

        The next mount clears what stays.
        """
        try:
            self.remove_tree(name)
        except OSError as error:
            log.warning("%s stays in the work directory: %s", os.fsdecode(name), error.strerror)

    def remove_tree(self, name: bytes) -> None:
        """Remove an entry of the work directory with all below it, however deep, following no links."""
        try:
            os.unlink(name, dir_fd=self.fd)
            return
        except IsADirectoryError:
            pass
        # Directories are moved up as they are met: neither depth nor descriptors grow with the tree.
        pending = [name]
        while pending:
            top = pending.pop()
            dir_fd = paths.open_dir_at(self.fd, top)
            try:
                for child, _, _ in self.listing(dir_fd, b"."):
                    try:
                        os.unlink(child, dir_fd=dir_fd)
                    except IsADirectoryError:
                        moved = self.temporary_name()
                        renameat2(dir_fd, child, self.fd, moved)
                        pending.append(moved)
            finally:
                os.close(dir_fd)
            os.rmdir(top, dir_fd=self.fd)

    @staticmethod
    def listing(dir_fd: int, name: bytes) -> list[tuple[bytes, int, int]]:
        """The entries of a directory, as files.list_dir has them."""
        fd = paths.open_dir_read(dir_fd, name)
        try:
            return files.list_dir(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Release the lock and the descriptors."""
        for fd in (self.fd, self.lock_fd, self.whiteout_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.lock_fd = self.whiteout_fd = -1


def read_index(path: bytes, *, mount_flags: int) -> Layer | None:
    """The index directory in the work directory at `path`, for a mount that changes nothing; None where there is none.

    Raises LayerError where the work directory can't be opened.
    """
    root = open_lower(path, mount_flags=mount_flags)
    try:
        return Layer(b"index", paths.open_dir_at(root, b"index"), 0)
    except FileNotFoundError:
        return None
    finally:
        os.close(root)


def _make_dir(dir_fd: int, name: bytes) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=dir_fd)
    except FileExistsError:
        # an earlier mount's
        return
