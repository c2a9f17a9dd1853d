"""Copy-up: an object of a lower layer gets its copy in the upper one, all at once or not at all.

The copy is built in the work directory: data, owner, xattrs, mode, times, then the marks. One link or rename makes it
visible, and only then does memory change. Source: fs/overlayfs/copy_up.c.
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import index, lookup, nameless, objects, owners, protection
from overlayfs_py.core.ids import OVERRIDE_KEYS
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.requests import Job, Steps
from overlayfs_py.core.work import Staged
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import copying, files, xattrs
from overlayfs_py.sys.paths import fd_path

if TYPE_CHECKING:
    from overlayfs_py.core.layers import Layer
    from overlayfs_py.core.overlay import Overlay

log = Journal(__name__)

IN_PLACE_BYTES = 64 << 10
"""Copying this much takes less time than handing it to a thread."""


_REMEMBERED = 512
"""Of so many directories it is remembered that they are marked as holding copies."""


def copy_up(fs: Overlay, node: Node, *, data: bool = True, size: int | None = None) -> Steps[bool]:
    """Give `node` its place in the upper layer, its parents first; nothing to do where it has one.

    Without `data` a metacopy will do, if the mount makes them. With `size`, the caller wants to truncate a regular file
    to that many bytes: where a copy is made it has that size at once, and the answer is whether it has been so.
    """
    fs.writable()
    truncated = False
    if not data and node in fs.copying:
        # What changes a metacopy waits for the data that is on its way into the same file, or its times would be lost.
        yield fs.copying[node]
    while node.upper is None and node.pinned < 0:
        if not node.removed:
            assert node.parent is not None
            copy_up_dirs(fs, node.parent)
        if node.kind == stat.S_IFDIR:
            copy_up_dirs(fs, node)
        elif node.kind == stat.S_IFREG:
            truncated = yield from _copy_up_file(fs, node, data=data, size=size)
        else:
            _copy_up_special(fs, node)
        if node.indexed:
            _link_up_known_names(fs, node)
    if data:
        while node.metacopy:
            truncated = yield from _copy_up_data(fs, node, size=size)
    return truncated


def copy_up_dirs(fs: Overlay, node: Node) -> None:
    """Give the directory `node` and all above it their places in the upper layer."""
    chain = []
    at: Node | None = node
    while at is not None and at.upper is None:
        chain.append(at)
        at = at.parent
    for directory in reversed(chain):
        _copy_up_dir(fs, directory)


def copy_up_name(fs: Overlay, node: Node, parent: Node, name: bytes) -> Steps[None]:
    """Copy up, and see that `name` in `parent` is one of the names the object has in the upper layer.

    Only objects in the index may be in the upper layer under some of their names alone.
    """
    yield from copy_up(fs, node, data=False)
    if node.indexed:
        _link_up(fs, node, parent, name)


def _link_up_known_names(fs: Overlay, node: Node) -> None:
    """Have a copy in the index under all its known names in the upper layer.

    A request names the node, not which of its names was used: whoever takes the upper layer for what has changed must
    find the one that was.
    """
    for parent, name in node.names():
        try:
            _link_up(fs, node, parent, name)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EMLINK):
                raise
            # the copy is made, and the mount shows it under every name, through the index
            return


def _link_up(fs: Overlay, node: Node, parent: Node, name: bytes) -> None:
    copy_up_dirs(fs, parent)
    assert parent.upper is not None
    if lookup.entry(fs, parent.upper, name) is None:
        _, st = lookup.lower_entries(fs, parent.lowers, name)
        before = os.fstat(fs.dir_fd(parent))
        index.link_up(fs, node, parent, name, lower_nlink=st.st_nlink if st is not None else node.nlink)
        mark_impure(fs, parent)
        restore_times(fs, parent, before)


def _copy_up_dir(fs: Overlay, node: Node) -> None:
    work = fs.writable()
    parent = node.parent
    if node.removed or parent is None or parent.upper is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), node.name)
    lower = node.lowers[0]
    staged = work.stage_dir()
    try:
        st = os.fstat(fs.dirs.fd(lower))
        upper_ino = _copy_metadata(fs, lower, fs.dirs.fd(lower), staged, st)
        _set_origin(fs, staged, index.origin_of(fs, lower))
        files.futimens(staged.fd, st.st_atime_ns, st.st_mtime_ns)
        _publish(fs, staged, parent, node.name)
    finally:
        staged.close()
    node.upper = Real(parent.upper.layer, parent.upper, node.name)
    node.upper_ino = upper_ino


def _publish(fs: Overlay, staged: Staged, parent: Node, name: bytes) -> None:
    """Make a finished copy visible as `name`; the parent's times stay, as nothing in it seems to change."""
    dir_fd = mark_impure(fs, parent)
    before = os.fstat(dir_fd)
    staged.publish(dir_fd, name)
    restore_times(fs, parent, before)


def restore_times(fs: Overlay, parent: Node, before: os.stat_result) -> None:
    """Give a directory the times it had before something in it was replaced by its equal.

    That has been done and can't be undone, so a failure is noted and no more (ovl_copy_up_one does the same).
    """
    try:
        files.futimens(fs.dir_fd(parent), before.st_atime_ns, before.st_mtime_ns)
    except OSError as error:
        log.warning("the times of %s could not be kept: %s", os.fsdecode(parent.name), error.strerror)


def mark_impure(fs: Overlay, parent: Node) -> int:
    """Note on an upper directory that it holds copies: the kernel then asks for their origins when listing it.

    The disk is asked only once; the answer is the descriptor of the directory's upper part.
    """
    dir_fd = fs.dir_fd(parent)
    assert parent.upper is not None
    if parent.upper not in fs.impure:
        if fs.marks.impure not in xattrs.flist(dir_fd):
            xattrs.fset(dir_fd, fs.marks.impure, b"y")
        if len(fs.impure) >= _REMEMBERED:
            fs.impure.clear()
        fs.impure.add(parent.upper)
    return dir_fd


def _set_origin(fs: Overlay, staged: Staged, origin: bytes | None) -> None:
    """Note which lower object this is a copy of, so that its inode number stays."""
    if origin is None:
        return
    try:
        os.setxattr(staged.at, fs.marks.origin, origin)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
            raise
        # user.* xattrs don't go on symbolic links and special files: only their inode number is lost on remount


def _copy_metadata(
    fs: Overlay, lower: Real, source: int, staged: Staged, st: os.stat_result, *, opened: bool = False
) -> int:
    """Owner, xattrs with ACLs, mode and flags; the answer is the copy's inode number.

    A change of owner clears set-id bits and capabilities, so it comes first. The mode comes after the ACL, as an ACL of
    the lower layer may disagree with it. `opened` says that the source is no O_PATH descriptor.
    """
    uid, gid, mode, rdev = owners.on_disk(lower.layer, source, st)
    made = os.fstat(staged.fd)
    owners.set_copied(fs, staged, made, uid, gid, mode, rdev)
    _copy_xattrs(fs, lower.layer, source if opened else fd_path(source), staged)
    # Before the mode, with which it may be one that this process can't mark.
    protection.copy(fs, source, staged, stat.S_IFMT(st.st_mode), opened=opened)
    if not stat.S_ISLNK(mode):
        owners.set_mode(fs, staged, stat.S_IMODE(mode))
    return made.st_ino


def _copy_xattrs(fs: Overlay, layer: Layer, source: int | bytes, staged: Staged) -> None:
    assert fs.upper is not None
    owner_keys = (layer.override, fs.upper.override)
    try:
        keys = [os.fsencode(key) for key in os.listxattr(source)]
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # a layer without xattrs
        return
    for key in keys:
        if fs.marks.hidden(key) or key in owner_keys:
            continue
        try:
            value = os.getxattr(source, key)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            # some filesystems list what they only make up on request
            continue
        try:
            os.setxattr(staged.at, key, value)
        except OSError as error:
            if error.errno == errno.EPERM and key in OVERRIDE_KEYS:
                # Only a privileged daemon can set it, and here it is without meaning.
                continue
            if error.errno != errno.EOPNOTSUPP or key.startswith((b"system.posix_acl", b"security.")):
                raise
            # as the kernel has it: an upper that can't hold an xattr is no reason to refuse the change, unless it
            # guards access


def _copy_up_special(fs: Overlay, node: Node) -> None:
    work = fs.writable()
    lower = node.lowers[0]
    with objects.reached(fs, node) as source:
        st = os.fstat(source)
        objects.check_kind(node, st)
        if node.kind == stat.S_IFLNK:
            staged = work.stage_symlink(os.readlink(b"", dir_fd=source))
        else:
            staged = work.stage_node(stat.S_IFMT(st.st_mode), st.st_rdev)
        try:
            upper_ino = _copy_metadata(fs, lower, source, staged, st)
            files.futimens(staged.fd, st.st_atime_ns, st.st_mtime_ns)
            _place(fs, node, lower, staged, st, upper_ino)
        finally:
            staged.close()


def _copy_up_file(fs: Overlay, node: Node, *, data: bool, size: int | None) -> Steps[bool]:
    pending = fs.copying.get(node)
    if pending is not None:
        # Whether it has run says nothing: the operation that began it may not have committed it yet.
        yield pending
        _raise_of_another(pending)
        return False
    work = fs.writable()
    lower = node.lowers[0]
    # What is about to be read from need not be opened twice.
    source = -1
    if len(node.lowers) == 1 and size != 0 and (data or not fs.metacopy):
        source = _open_to_read(fs, lower)
    opened = source >= 0
    if not opened:
        source = objects.open_path(fs, lower)
    try:
        st = os.fstat(source)
        objects.check_kind(node, st)
        needed = st.st_size if size is None else min(size, st.st_size)
        bare = not data and fs.metacopy and st.st_size > 0
        draft = None if bare or size is not None else fs.drafts.take(node, lower, st)
        staged = draft or work.stage_file(0o600)
        try:
            if draft is not None:
                # its data is there, and on disk
                pass
            elif bare:
                os.ftruncate(staged.fd, st.st_size)
                os.setxattr(staged.fd, fs.marks.metacopy, b"")
            elif needed and opened:
                yield from _copy_data(fs, node, lower, source, st, staged.fd, needed)
            elif needed:
                yield from _copy_from(fs, node, node.lowers[-1], staged.fd, needed)
            if size is not None and size != needed:
                os.ftruncate(staged.fd, size)
            upper_ino = _copy_metadata(fs, lower, source, staged, st, opened=opened)
            if size is None:
                os.utime(staged.fd, ns=(st.st_atime_ns, st.st_mtime_ns))
            else:
                files.futimens(staged.fd, st.st_atime_ns, None)
            if node.upper is not None or node.pinned >= 0:
                return False
            fd = os.dup(staged.fd) if size is not None else -1
            try:
                _place(fs, node, lower, staged, st, upper_ino, metacopy=bare)
            except OSError:
                if fd >= 0:
                    os.close(fd)
                raise
            if fd >= 0:
                fs.files.adopt(node, fd, write=True)
            return size is not None
        finally:
            staged.close()
    finally:
        os.close(source)


def _raise_of_another(job: Job) -> None:
    """Raise what a job of another operation raised, unless that one was killed: then the work is begun anew."""
    if job.error is not None and job.error.errno != errno.EINTR:
        raise job.error


def _open_to_read(fs: Overlay, real: Real) -> int:
    """A descriptor of a lower file, or of what took its place; -1 where it can't be read, which need be no failure."""
    assert real.parent is not None
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(real.name, flags, dir_fd=fs.dirs.fd(real.parent))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ELOOP, errno.ENXIO):
            raise
        # an empty file needs no reading; a link or a socket is another object than the node's
        return -1


def _copy_from(fs: Overlay, node: Node, real: Real, target: int, size: int) -> Steps[None]:
    """As _copy_data, from a file that is not open yet."""
    source = objects.open_file(fs, real, os.O_RDONLY)
    try:
        yield from _copy_data(fs, node, real, source, os.fstat(source), target, size)
    finally:
        os.close(source)


def _copy_data(
    fs: Overlay, node: Node, real: Real, source: int, st: os.stat_result, target: int, size: int
) -> Steps[None]:
    """Copy the first `size` bytes of `real`, open as `source` with the attributes `st`, and see that they are on disk
    before the copy is made visible.

    Blocks that both files share are on disk already: a reflink is a change of metadata, in order with the name that
    follows it (ovl_copy_up_file leaves out the sync as well).
    """

    # A few bytes without holes are copied faster than it takes to ask for more than a copy.
    at_once = copying.goes_at_once(size, st) and real.layer in fs.unshared
    batch = fs.drafts.begin(node, real) if at_once else None

    def run() -> None:
        if at_once:
            copying.copy_at_once(source, target, size)
            if batch is not None:
                batch.run(target)
                return
        elif copying.copy_data(source, target, size, 0, job.unwanted, to_be_synced=fs.sync):
            return
        else:
            fs.unshared.add(real.layer)
        if fs.sync:
            os.fsync(target)

    job = Job(run)
    if size <= IN_PLACE_BYTES and not fs.sync:
        run()
        return
    fs.copying[node] = job
    try:
        yield job
    finally:
        del fs.copying[node]
        if batch is not None:
            fs.drafts.end(batch, done=job.finished and job.error is None)
    if job.error is not None:
        raise job.error


def _place(
    fs: Overlay,
    node: Node,
    lower: Real,
    staged: Staged,
    st: os.stat_result,
    upper_ino: int,
    *,
    metacopy: bool = False,
) -> None:
    """Commit the copy of anything but a directory: to the index where it is hard-linked, and to its name."""
    if node.removed:
        # No name leads to it any more; it lives as long as it is referred to.
        node.upper_ino = upper_ino
        nameless.keep_staged(fs, node, staged)
        node.metacopy = metacopy
        fs.files.drop(node)
        return
    parent = node.parent
    assert parent is not None and parent.upper is not None
    linked = st.st_nlink > 1
    indexed = linked and index.covers(fs, node.kind)
    origin = index.origin_of(fs, lower) if indexed or not linked else None
    _set_origin(fs, staged, origin)
    upper = Real(parent.upper.layer, parent.upper, node.name)
    if indexed and fs.index is not None and origin is not None:
        os.setxattr(staged.at, fs.marks.nlink, b"L+0")
        upper = Real(fs.index, fs.index.root, index.entry_name(origin))
        staged.link(fs.index.fd, upper.name)
        node.indexed = True
        node.nlink = st.st_nlink
    try:
        _publish(fs, staged, parent, node.name)
    except OSError:
        if node.indexed:
            os.unlink(upper.name, dir_fd=upper.layer.fd)
            node.indexed = False
        raise
    node.upper = upper
    node.upper_ino = upper_ino
    node.metacopy = metacopy
    if not metacopy:
        node.lowers = ()
    fs.files.drop(node)


def _copy_up_data(fs: Overlay, node: Node, *, size: int | None) -> Steps[bool]:
    """Give a metacopy of the upper layer its data.

    It is written into the very file, which stays a metacopy, its data the lower one's, until all of it is there. One
    that is to be shorter is cut before that: the size it shows is its own already.
    """
    pending = fs.copying.get(node)
    if pending is not None:
        # Whether it has run says nothing: the operation that began it may not have committed it yet.
        yield pending
        _raise_of_another(pending)
        return False
    with objects.reached(fs, node) as fd:
        st = os.fstat(fd)
        needed = st.st_size if size is None else min(size, st.st_size)
        target = os.open(fd_path(fd), os.O_RDWR | os.O_CLOEXEC)
        complete = False
        try:
            if needed:
                yield from _copy_from(fs, node, node.lowers[-1], target, needed)
            if needed < st.st_size:
                os.ftruncate(target, needed)
            else:
                files.futimens(fd, st.st_atime_ns, st.st_mtime_ns)
            xattrs.fremove(fd, fs.marks.metacopy)
            complete = True
        except OSError:
            os.ftruncate(target, st.st_size)
            files.futimens(fd, st.st_atime_ns, st.st_mtime_ns)
            raise
        finally:
            if not complete:
                os.close(target)
    node.metacopy = False
    if node.upper is not None:
        # else: removed before it was copied up, as in _place
        node.lowers = ()
    if protection.of(fs, node):
        # It isn't to be written as it was opened here.
        os.close(target)
        fs.files.drop(node)
    else:
        fs.files.adopt(node, target, write=True)
    return needed < st.st_size
