"""Removing names: whiteouts where a lower layer would show through, and objects that live on without a name.

Source: fs/overlayfs/dir.c (ovl_do_remove, ovl_clear_empty).
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import copyup, index, lookup, nameless, objects, owners, protection, readdir
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.requests import Steps
from overlayfs_py.core.work import Staged
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import files, xattrs
from overlayfs_py.sys.rename import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay


def unlink(fs: Overlay, parent: Node, name: bytes) -> Steps[None]:
    """Remove a name of anything but a directory. Raises ENOENT, EISDIR, EROFS."""
    fs.writable()
    node = None
    # Another operation may come between while data is copied.
    while node is None or (parent.children or {}).get(name) is not node:
        node = lookup.lookup(fs, parent, name)
        if node.kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        protection.check_removal(fs, parent, node)
        yield from prepare_linked(fs, node, parent, name)
    _remove(fs, node, parent, name)


def rmdir(fs: Overlay, parent: Node, name: bytes) -> Steps[None]:
    """Remove an empty directory. Raises ENOENT, ENOTDIR, ENOTEMPTY, EROFS."""
    node = lookup.lookup(fs, parent, name)
    if node.kind != stat.S_IFDIR:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    fs.writable()
    protection.check_removal(fs, parent, node)
    if not readdir.is_empty(fs, node):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
    _remove(fs, node, parent, name)
    yield from ()


def prepare_linked(fs: Overlay, node: Node, parent: Node, name: bytes) -> Steps[None]:
    """Before a name of a hard-linked object goes: note in the index how many names are left.

    A lower object has to be copied up for that, as the index is the only place where its count can be kept.
    """
    if not index.covers(fs, node.kind):
        return
    if node.indexed or (node.upper is None and objects.stat_node(fs, node).st_nlink > 1):
        yield from copyup.copy_up_name(fs, node, parent, name)
        if node.indexed:
            index.note_before_change(fs, node)


def _remove(fs: Overlay, node: Node, parent: Node, name: bytes) -> None:
    """Take `name` away in one step: by a whiteout in its place, or by unlinking it."""
    whiteout = lookup.lower_positive(fs, parent, name)
    if whiteout:
        copyup.copy_up_dirs(fs, parent)
    present = parent.upper is not None and is_in_upper(fs, parent, name)
    kept = keep(fs, node, parent, name, moves=present)
    try:
        if whiteout:
            _put_whiteout(fs, node, parent, name, present=present, kept_name=kept.name)
        elif present and node.kind == stat.S_IFDIR:
            _remove_upper_dir(fs, node, parent, name, kept_name=kept.name)
        elif present:
            os.unlink(name, dir_fd=fs.dir_fd(parent))
    except OSError:
        nameless.undo(fs, kept)
        raise
    after_removal(fs, node, parent, name, kept.fd, kept.name)


def is_in_upper(fs: Overlay, parent: Node, name: bytes) -> bool:
    """Whether the upper layer has something at `name`, a whiteout device included."""
    try:
        os.stat(name, dir_fd=fs.dir_fd(parent), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _put_whiteout(
    fs: Overlay, node: Node, parent: Node, name: bytes, *, present: bool, kept_name: bytes | None
) -> None:
    work = fs.writable()
    dir_fd = fs.dir_fd(parent)
    if not present and work.whiteouts == "device":
        work.put_whiteout_device(dir_fd, name)
        return
    staged = stage_whiteout(fs, parent)
    try:
        if present and node.kind == stat.S_IFDIR:
            staged.exchange(fs.dir_fd(parent), name, RENAME_EXCHANGE)
            if kept_name is not None:
                staged.publish(work.fd, kept_name)
        else:
            staged.publish(fs.dir_fd(parent), name, replace=present)
    finally:
        staged.close()


def stage_whiteout(fs: Overlay, parent: Node) -> Staged:
    """A whiteout for the directory `parent`, which is marked as holding such where they are xattrs."""
    work = fs.writable()
    if work.whiteouts == "xattr":
        allow_xattr_whiteouts(fs, parent)
    return work.stage_whiteout(fs.marks)


def allow_xattr_whiteouts(fs: Overlay, parent: Node) -> None:
    """Mark a directory, and the layer's root, as holding xattr whiteouts (opaque=x)."""
    assert fs.upper is not None
    for fd in (fs.upper.fd, fs.dir_fd(parent)):
        marked = fs.marks.read_dir(fd)
        if not marked.xattr_whiteouts and not marked.opaque:
            xattrs.fset(fd, fs.marks.opaque, b"x")
    fs.upper.xattr_whiteouts = True


def _remove_upper_dir(fs: Overlay, node: Node, parent: Node, name: bytes, *, kept_name: bytes | None) -> None:
    """Remove a directory that shows nothing; whiteouts may still be in it, so it goes out of sight first."""
    dir_fd = fs.dir_fd(parent)
    if kept_name is not None:
        renameat2(dir_fd, name, fs.writable().fd, kept_name, RENAME_NOREPLACE)
        return
    try:
        os.rmdir(name, dir_fd=dir_fd)
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    work = fs.writable()
    gone = work.temporary_name()
    renameat2(dir_fd, name, work.fd, gone, RENAME_NOREPLACE)
    work.discard(gone)


def clear_empty(fs: Overlay, node: Node) -> None:
    """Replace a directory of the upper layer that shows nothing by an empty opaque one, so that it can be renamed over.

    Nothing visible changes; owner, mode, xattrs and times are kept.
    """
    parent = node.parent
    assert node.upper is not None and parent is not None
    override = node.upper.layer.override
    staged = fs.writable().stage_dir()
    try:
        with objects.reached(fs, node) as source:
            st = os.fstat(source)
            uid, gid, mode, rdev = owners.on_disk(node.upper.layer, source, st)
            owners.set_new(fs, staged.fd, uid, gid, mode, rdev)
            for key in xattrs.flist(source):
                if not fs.marks.hidden(key) and key != override:
                    xattrs.fset(staged.fd, key, xattrs.fget(source, key))
            xattrs.fset(staged.fd, fs.marks.opaque, b"y")
            files.futimens(staged.fd, st.st_atime_ns, st.st_mtime_ns)
        upper_ino = os.fstat(staged.fd).st_ino
        before = os.fstat(fs.dir_fd(parent))
        staged.exchange(fs.dir_fd(parent), node.name, RENAME_EXCHANGE)
    finally:
        staged.close()
    # The descriptor held is the old directory's.
    fs.dirs.drop(node.upper)
    fs.impure.discard(node.upper)
    fs.merged.drop(node)
    node.upper_ino = upper_ino
    node.lowers = ()
    copyup.restore_times(fs, parent, before)


def keep(fs: Overlay, node: Node, parent: Node, name: bytes, *, moves: bool = False) -> nameless.Kept:
    """What keeps the object of the upper layer reachable when `name`, its last one, goes; nothing if nothing has to."""
    if node.upper is None or node.pinned >= 0 or not (node.lookups or node.opens):
        return nameless.Kept()
    if node.has_other_name(parent, name):
        return nameless.Kept()
    if node.indexed and node.nlink > 1:
        return nameless.Kept()
    return nameless.keep(fs, node, moves=moves)


def after_removal(
    fs: Overlay, node: Node, parent: Node, name: bytes, kept_fd: int, kept_name: bytes | None = None
) -> None:
    """Tell memory that `name` no longer leads to `node`, which is kept as keep() said."""
    node.drop_name(parent, name)
    fs.drafts.drop(node)
    if node.indexed:
        node.nlink -= 1
        index.drop_if_unused(fs, node)
    before = node.upper
    if kept_fd >= 0 or kept_name is not None:
        nameless.take(fs, node, nameless.Kept(kept_fd, kept_name))
    elif node.upper is not None and not node.indexed and not node.removed:
        assert node.parent is not None and node.parent.upper is not None
        node.upper = Real(node.parent.upper.layer, node.parent.upper, node.name)
    if node.kind == stat.S_IFDIR:
        for real in (before, *node.lowers):
            if real is not None:
                fs.dirs.drop(real)
    if not node.lookups and not node.opens and node.removed:
        lookup.release(fs, node)
