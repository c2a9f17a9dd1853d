"""New objects: files, directories, symbolic links, special files, hard links.

A system call in the upper directory, made as the caller's, does everything at once: what the directory hands down, as
its group, an ACL, flags or a project id, is for its filesystem to know. Where that call would make something else than
the mount is to show, or there is a whiteout to replace, the object is built in the work directory, with its owner, ACL
and mode, and then published.
Source: fs/overlayfs/dir.c.
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import acl, copyup, index, lookup, marks, nameless, objects, owners, protection
from overlayfs_py.core.files import File
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.requests import Caller, Steps
from overlayfs_py.core.work import Staged
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import files, xattrs
from overlayfs_py.sys.credentials import acting_as
from overlayfs_py.sys.rename import RENAME_EXCHANGE

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

log = Journal(__name__)

ACL_ACCESS = b"system.posix_acl_access"
ACL_DEFAULT = b"system.posix_acl_default"

_MADE_BY_MKNOD = frozenset((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK))


def create(fs: Overlay, caller: Caller, parent: Node, name: bytes, mode: int) -> tuple[Node, File]:
    """Make a regular file and open it for reading and writing; EEXIST where the name is taken."""
    over_whiteout = _make_room(fs, parent, name)
    file_fd = -1
    if not over_whiteout and _is_for_disk(fs, caller) and not marks.is_dot_name(name):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with _as(caller):
            file_fd = os.open(name, flags, stat.S_IMODE(mode), dir_fd=fs.dir_fd(parent))
        try:
            st = os.fstat(file_fd)
        except OSError:
            os.close(file_fd)
            os.unlink(name, dir_fd=fs.dir_fd(parent))
            raise
    else:
        staged = fs.writable().stage_file(0o600)
        try:
            st = _finish(fs, caller, parent, staged, stat.S_IFREG | stat.S_IMODE(mode), name)
            file_fd = os.dup(staged.fd)
            staged.publish(fs.dir_fd(parent), name, replace=over_whiteout)
        except OSError:
            if file_fd >= 0:
                os.close(file_fd)
            raise
        finally:
            staged.close()
    node = _new_node(fs, parent, name, st)
    node.opens += 1
    fs.files.adopt(node, file_fd, write=True)
    return node, File(node)


def mknod(fs: Overlay, caller: Caller, parent: Node, name: bytes, mode: int, rdev: int) -> Node:
    """Make a file, FIFO, socket or device. A whiteout device can't be made through the mount: EPERM, as in the kernel.

    Raises EEXIST where the name is taken, EINVAL where `mode` has another type, or none.
    """
    if stat.S_IFMT(mode) not in _MADE_BY_MKNOD:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
    if stat.S_ISCHR(mode) and rdev == marks.WHITEOUT_DEVICE:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), name)
    over_whiteout = _make_room(fs, parent, name)
    if not over_whiteout and _is_for_disk(fs, caller) and not marks.is_dot_name(name):
        with _as(caller):
            files.make_node(fs.dir_fd(parent), name, mode, rdev)
        st = _stat_new(fs, parent, name)
    else:
        work = fs.writable()
        assert fs.upper is not None
        plain = stat.S_ISREG(mode) or fs.upper.override is not None
        staged = work.stage_file(0o600) if plain else work.stage_node(mode, rdev)
        try:
            st = _finish(fs, caller, parent, staged, mode, name, rdev)
            staged.publish(fs.dir_fd(parent), name, replace=over_whiteout)
        finally:
            staged.close()
    return _new_node(fs, parent, name, st)


def symlink(fs: Overlay, caller: Caller, parent: Node, name: bytes, target: bytes) -> Node:
    """Make a symbolic link to `target`; EEXIST where the name is taken."""
    over_whiteout = _make_room(fs, parent, name)
    if not over_whiteout and _is_for_disk(fs, caller):
        with _as(caller):
            os.symlink(target, name, dir_fd=fs.dir_fd(parent))
        st = _stat_new(fs, parent, name)
    else:
        staged = fs.writable().stage_symlink(target)
        try:
            st = _finish(fs, caller, parent, staged, stat.S_IFLNK | 0o777, name)
            staged.publish(fs.dir_fd(parent), name, replace=over_whiteout)
        finally:
            staged.close()
    return _new_node(fs, parent, name, st)


def mkdir(fs: Overlay, caller: Caller, parent: Node, name: bytes, mode: int) -> Node:
    """Make a directory; EEXIST where the name is taken. It is opaque where lower layers could show through."""
    over_whiteout = _make_room(fs, parent, name)
    if not over_whiteout and _is_for_disk(fs, caller):
        with _as(caller):
            os.mkdir(name, stat.S_IMODE(mode), dir_fd=fs.dir_fd(parent))
        # Without a whiteout, no lower layer has the name: the mark spares looking for all that is below it.
        st = _stat_new(fs, parent, name, opaque=bool(parent.lowers))
    else:
        staged = fs.writable().stage_dir()
        try:
            st = _finish(fs, caller, parent, staged, stat.S_IFDIR | stat.S_IMODE(mode), name)
            if parent.lowers:
                xattrs.fset(staged.fd, fs.marks.opaque, b"y")
            if over_whiteout:
                # A directory can't replace a whiteout by a plain rename; the whiteout goes with the staged name.
                staged.exchange(fs.dir_fd(parent), name, RENAME_EXCHANGE)
            else:
                staged.publish(fs.dir_fd(parent), name)
        finally:
            staged.close()
    node = _new_node(fs, parent, name, st)
    node.markless = True
    return node


def link(fs: Overlay, node: Node, parent: Node, name: bytes) -> Steps[Node]:
    """Give `node` the further name `name` in `parent`; EEXIST where it is taken, EMLINK as the upper layer has it."""
    if stat.S_ISDIR(node.kind):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    fs.writable()
    protection.check(fs, node)
    protection.check(fs, parent, protection.IMMUTABLE)
    yield from copyup.copy_up(fs, node, data=False)
    if node.removed and node.name and objects.attr(fs, node).nlink == 0:
        # Only a file opened with O_TMPFILE can come back from having no name. One may have names nobody has looked up.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), node.name)
    over_whiteout = _make_room(fs, parent, name)
    work = fs.writable()
    if node.indexed:
        index.note_before_change(fs, node)
    if marks.is_dot_name(name) and node.kind == stat.S_IFREG:
        with objects.reached(fs, node) as fd:
            xattrs.fset(fd, fs.marks.literal, b"y")
    if node.metacopy:
        _set_metacopy_redirect(fs, node)
    copyup.mark_impure(fs, parent)
    upper = objects.real_of(node)
    target, target_name = fs.dir_fd(parent), name
    if over_whiteout:
        target, target_name = work.fd, work.temporary_name()
    if node.pinned >= 0:
        files.link_fd(node.pinned, target, target_name)
    else:
        assert upper.parent is not None
        os.link(
            upper.name,
            target_name,
            src_dir_fd=fs.dirs.fd(upper.parent),
            dst_dir_fd=target,
            follow_symlinks=False,
        )
    if over_whiteout:
        try:
            os.rename(target_name, name, src_dir_fd=work.fd, dst_dir_fd=fs.dir_fd(parent))
        except OSError:
            work.discard(target_name)
            raise
    if node.indexed:
        node.nlink += 1
    node.add_name(parent, name)
    if node.pinned >= 0 or nameless.named_in_work(fs, node):
        assert parent.upper is not None
        node.upper = Real(parent.upper.layer, parent.upper, name)
        nameless.let_go(fs, node)
        nameless.let_go_of_name(fs, upper)
    return node


def tmpfile(fs: Overlay, caller: Caller, parent: Node, mode: int) -> Node:
    """Make a regular file without a name (O_TMPFILE), which link may give one later."""
    _check_parent(fs, parent, b"")
    work = fs.writable()
    in_place = work.tmpfiles and _is_for_disk(fs, caller)
    if in_place:
        with _as(caller):
            staged = Staged(work, files.tmpfile(fs.dir_fd(parent), stat.S_IMODE(mode)), None, opened=True)
    else:
        staged = work.stage_file(0o600)
    try:
        if not in_place:
            _finish(fs, caller, parent, staged, stat.S_IFREG | stat.S_IMODE(mode), b"")
        st = os.fstat(staged.fd)
        assert parent.upper is not None
        node = Node(stat.S_IFREG, parent, b"", Real(parent.upper.layer, parent.upper, b""), ())
        node.removed = True
        nameless.keep_staged(fs, node, staged)
    finally:
        staged.close()
    node.upper_ino = st.st_ino
    fs.nodes.add(node, fs.numbers.number(st.st_dev, st.st_ino))
    return node


def _set_metacopy_redirect(fs: Overlay, node: Node) -> None:
    """A metacopy that gets another name must say by path where its data is."""
    if node.redirect is not None and node.redirect.startswith(b"/"):
        return
    assert node.parent is not None
    redirect = lookup.lower_path(node, node.parent, node.name)
    with objects.reached(fs, node) as fd:
        xattrs.fset(fd, fs.marks.redirect, redirect)
    node.redirect = redirect


def _make_room(fs: Overlay, parent: Node, name: bytes) -> bool:
    """Copy up the parent, and see that `name` is free; whether a whiteout is there that must be replaced.

    The lower layers are not searched again: who makes something has looked the name up, and found nothing.
    """
    if parent.children is not None and name in parent.children:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    _check_parent(fs, parent, name)
    assert parent.upper is not None
    try:
        os.stat(name, dir_fd=fs.dir_fd(parent), follow_symlinks=False)
    except FileNotFoundError:
        return False
    if lookup.entry(fs, parent.upper, name) is lookup.WHITEOUT:
        return True
    # An AUFS-style mark is not shown either, but replacing it would bring back what it hides.
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)


def _check_parent(fs: Overlay, parent: Node, name: bytes) -> None:
    """Copy up the directory that is to get an entry of this name."""
    fs.writable()
    if len(name) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
    if parent.removed:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    protection.check(fs, parent, protection.IMMUTABLE)
    copyup.copy_up_dirs(fs, parent)


def _is_for_disk(fs: Overlay, caller: Caller) -> bool:
    """Whether a system call made as the caller's makes just what it would make on a plain filesystem."""
    assert fs.upper is not None
    same = caller.uid == os.geteuid() and caller.gid == os.getegid()
    return (
        (same or fs.acts_as_others)
        and not caller.labels
        and fs.ids.identity
        and fs.upper.override is None
        and not _without_acls(fs)
    )


def _as(caller: Caller) -> acting_as:
    """The block in which this thread makes things as `caller` does: with its umask, and as its own."""
    os.umask(caller.umask)
    return acting_as(caller.uid, caller.gid)


def _without_acls(fs: Overlay) -> bool:
    """Whether default ACLs that the upper layer has mean nothing to what is made through the mount."""
    return fs.config.noacl or fs.config.noxattrs


def _finish(
    fs: Overlay, caller: Caller, parent: Node, staged: Staged, mode: int, name: bytes, rdev: int = 0
) -> os.stat_result:
    """Owner, ACLs, mode and labels of a new object, as its parent and the umask have them (acl(5), umask(2)).

    The attributes answered are those the object then has: nothing needs to be asked once it is visible.
    """
    parent_attr = objects.attr(fs, parent)
    uid, gid = owners.creator(fs, caller)
    if parent_attr.mode & stat.S_ISGID:
        _, gid = owners.on_disk_owner(fs, parent)
        if stat.S_ISDIR(mode):
            mode |= stat.S_ISGID
    default = None if stat.S_ISLNK(mode) else _default_acl(fs, parent)
    access = None
    if default is None:
        if not stat.S_ISLNK(mode):
            mode &= ~stat.S_IMODE(caller.umask)
    else:
        permissions, access = acl.inherit(default, mode & 0o777)
        mode = mode & ~0o777 | permissions
    owners.set_new(fs, staged.fd, uid, gid, mode, rdev)
    if access is not None:
        xattrs.fset(staged.fd, ACL_ACCESS, access)
    if default is not None and stat.S_ISDIR(mode):
        xattrs.fset(staged.fd, ACL_DEFAULT, default)
    for key, value in caller.labels:
        xattrs.fset(staged.fd, key, value)
    st = os.fstat(staged.fd)
    if marks.is_dot_name(name) and stat.S_ISREG(st.st_mode):
        xattrs.fset(staged.fd, fs.marks.literal, b"y")
    return st


def _default_acl(fs: Overlay, parent: Node) -> bytes | None:
    if _without_acls(fs):
        return None
    try:
        return xattrs.fget(fs.dir_fd(parent), ACL_DEFAULT)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        # no default ACL, or a filesystem without ACLs
        return None


def _stat_new(fs: Overlay, parent: Node, name: bytes, *, opaque: bool = False) -> os.stat_result:
    """The attributes of an object just made, marked if it is to be `opaque`; if that fails it is made undone."""
    dir_fd = fs.dir_fd(parent)
    try:
        if opaque:
            _mark_opaque(fs, dir_fd, name)
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        try:
            os.unlink(name, dir_fd=dir_fd)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=dir_fd)
        raise


def _mark_opaque(fs: Overlay, dir_fd: int, name: bytes) -> None:
    """Say of a directory that nothing is below it, where that is so."""
    try:
        xattrs.set(dir_fd, name, fs.marks.opaque, b"y")
    except OSError as error:
        # It only spares looking: no failure of it is one of mkdir, as the kernel has it (ovl_create_upper).
        log.info("%s is not marked as opaque: %s", os.fsdecode(name), error.strerror)


def _new_node(fs: Overlay, parent: Node, name: bytes, st: os.stat_result) -> Node:
    assert parent.upper is not None
    upper = Real(parent.upper.layer, parent.upper, name)
    found = lookup.Found(st, upper, (), fs.numbers.number(st.st_dev, st.st_ino))
    node = lookup.node_for(fs, parent, name, found)
    protection.note(node, 0)
    return node
