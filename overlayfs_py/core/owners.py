"""Who owns an object and what its mode is: as its layer stores them, and as the mount shows them.

With `xattr_permissions` both live in an xattr (see ids.Override), and the object itself belongs to the daemon.
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import acl, ids, objects
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.requests import Caller
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import xattrs
from overlayfs_py.sys.paths import fd_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayfs_py.core.layers import Layer
    from overlayfs_py.core.overlay import Overlay
    from overlayfs_py.core.requests import InGroup
    from overlayfs_py.core.work import Staged

    Translate = Callable[[int], int]

# What an object itself is made with where its mode lives in an xattr: the daemon must be able to use it.
_STORED_DIR_MODE = 0o755
_STORED_FILE_MODE = 0o755


def shown(fs: Overlay, node: Node, st: os.stat_result) -> tuple[int, int, int, int]:
    """(uid, gid, mode, rdev) the mount shows for a node with these attributes on disk."""
    uid, gid, mode, rdev = st.st_uid, st.st_gid, st.st_mode, st.st_rdev
    layer = objects.layer_of(fs, node)
    if layer.override is not None:
        with objects.reached(fs, node) as fd:
            uid, gid, mode, rdev = on_disk(layer, fd, st)
    if not fs.ids.identity:
        uid, gid = fs.ids.uid_to_shown(uid), fs.ids.gid_to_shown(gid)
    return uid, gid, mode, rdev


def on_disk(layer: Layer, fd: int, st: os.stat_result) -> tuple[int, int, int, int]:
    """(uid, gid, mode, rdev) of an object of `layer` open at `fd`, as the layer means them."""
    override = read_override(fd, layer.override) if layer.override is not None else None
    if override is None:
        return st.st_uid, st.st_gid, st.st_mode, st.st_rdev
    return override.uid, override.gid, *ids.apply_override(override, st.st_mode, st.st_rdev)


def read_override(fd: int, key: bytes) -> ids.Override | None:
    try:
        return ids.parse_override(xattrs.fget(fd, key))
    except ValueError:
        # junk says nothing: the object is what it is on disk
        return None
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        # an object without the xattr is what it is on disk
        return None


def creator(fs: Overlay, caller: Caller) -> tuple[int, int]:
    """The owner on disk of what `caller` creates."""
    if fs.ids.identity:
        return caller.uid, caller.gid
    return fs.ids.creator_to_disk(caller.uid, caller.gid)


def set_new(fs: Overlay, fd: int, uid: int, gid: int, mode: int, rdev: int = 0) -> None:
    """Give a new object of the upper layer its owner and mode (with its type), by the descriptor `fd`."""
    assert fs.upper is not None
    if fs.upper.override is not None:
        _store_override(fd, fs.upper.override, ids.Override(uid, gid, stat.S_IMODE(mode), stat.S_IFMT(mode), rdev))
        if not stat.S_ISLNK(mode):
            os.chmod(fd_path(fd), _STORED_DIR_MODE if stat.S_ISDIR(mode) else _STORED_FILE_MODE)
        return
    change_owner(fs, fd_path(fd), uid, gid)
    if not stat.S_ISLNK(mode):
        os.chmod(fd_path(fd), stat.S_IMODE(mode))


def change_owner(fs: Overlay, at: int | bytes, uid: int, gid: int) -> None:
    """chown(2) of an open file or what a path leads to; -1 leaves an id as it is."""
    try:
        os.chown(at, uid, gid)
    except OSError as error:
        if not fs.ids.squashes or error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        # every owner is shown as one: the change could not be seen if it had worked


def set_copied(fs: Overlay, staged: Staged, made: os.stat_result, uid: int, gid: int, mode: int, rdev: int) -> None:
    """As set_new, of a copy that has the attributes `made`; set_mode sets its mode, when the xattrs are there."""
    assert fs.upper is not None
    if fs.upper.override is not None:
        set_new(fs, staged.fd, uid, gid, mode, rdev)
    elif (made.st_uid, made.st_gid) != (uid, gid):
        change_owner(fs, staged.at, uid, gid)


def set_mode(fs: Overlay, staged: Staged, mode: int) -> None:
    """chmod(2) of a new object, whose owner is set already."""
    assert fs.upper is not None
    if fs.upper.override is None:
        os.chmod(staged.at, mode)


def change(fs: Overlay, fd: int, *, uid: int | None, gid: int | None, mode: int | None) -> None:
    """Change owner, group or mode (permission bits) of an object of the upper layer; None leaves it.

    A change of owner clears the set-id bits as chown(2) does, so the mode comes after it.
    """
    assert fs.upper is not None
    key = fs.upper.override
    if uid is not None:
        uid = fs.ids.uid_to_disk(uid)
    if gid is not None:
        gid = fs.ids.gid_to_disk(gid)
    if key is not None:
        _change_override(fd, key, uid, gid, mode)
        return
    if uid is not None or gid is not None:
        change_owner(fs, fd_path(fd), -1 if uid is None else uid, -1 if gid is None else gid)
    if mode is not None:
        os.chmod(fd_path(fd), mode)


def without_set_ids(fs: Overlay, fd: int, in_group: InGroup | None = None) -> int | None:
    """The permission bits that a write, or a change of owner, leaves an open file of the upper layer; None if all.

    Set-group-id without group execution is no privilege: members of the group keep it (chmod(2);
    setattr_should_drop_sgid in fs/attr.c).
    """
    assert fs.upper is not None
    _, gid, mode, _ = on_disk(fs.upper, fd, os.fstat(fd))
    cleared = mode & ~stat.S_ISUID
    if cleared & stat.S_ISGID and (mode & stat.S_IXGRP or (in_group is not None and not in_group(gid))):
        cleared &= ~stat.S_ISGID
    return stat.S_IMODE(cleared) if cleared != mode else None


def clear_sgid(fs: Overlay, fd: int) -> None:
    """Take set-group-id from an object of the upper layer."""
    assert fs.upper is not None
    _, _, mode, _ = on_disk(fs.upper, fd, os.fstat(fd))
    if mode & stat.S_ISGID:
        change(fs, fd, uid=None, gid=None, mode=stat.S_IMODE(mode) & ~stat.S_ISGID)


def set_acl(key: bytes, fd: int, access: bytes, flags: int) -> None:
    """Set an access ACL, and the mode that is kept in the xattr `key` with it, as the upper filesystem does elsewhere
    (posix_acl_update_mode). Raises ValueError for what is none."""
    before = _override(fd, key)
    mode = before.mode
    entries = acl.parse(access)
    if entries:
        permissions, _ = acl.equivalent_mode(entries)
        mode = mode & ~0o777 | permissions
        access = _stored_acl(access, mode)
    _store_override(fd, key, before._replace(mode=mode))
    try:
        xattrs.fset(fd, acl.ACCESS_KEY, access, flags)
    except OSError:
        _store_override(fd, key, before)
        raise


def _store_override(fd: int, key: bytes, override: ids.Override) -> None:
    try:
        xattrs.fset(fd, key, ids.format_override(override))
    except OSError as error:
        if error.errno != errno.EPERM or not stat.S_ISLNK(os.fstat(fd).st_mode):
            raise
        # user.* xattrs don't go on symbolic links: they stay the daemon's, as in what containers/storage writes


def _change_override(fd: int, key: bytes, uid: int | None, gid: int | None, mode: int | None) -> None:
    old = _override(fd, key)
    kept = old.mode
    if (uid is not None or gid is not None) and not stat.S_ISDIR(os.fstat(fd).st_mode):
        kept &= ~stat.S_ISUID
        if kept & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
    new = old._replace(
        uid=old.uid if uid is None else uid,
        gid=old.gid if gid is None else gid,
        mode=kept if mode is None else mode,
    )
    _store_override(fd, key, new)
    if mode is not None:
        try:
            _chmod_acl(fd, mode)
        except OSError:
            _store_override(fd, key, old)
            raise


def _override(fd: int, key: bytes) -> ids.Override:
    st = os.fstat(fd)
    return read_override(fd, key) or ids.Override(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))


def _chmod_acl(fd: int, mode: int) -> None:
    """Have an access ACL say what a new mode does, as chmod(2) would."""
    try:
        access = xattrs.fget(fd, acl.ACCESS_KEY)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        # no ACL, or a filesystem without ACLs
        return
    changed = _stored_acl(access, mode)
    if changed != access:
        xattrs.fset(fd, acl.ACCESS_KEY, changed)


def _stored_acl(access: bytes, mode: int) -> bytes:
    """An access ACL as the file has it whose mode is elsewhere: a daemon that is not root must be able to use it."""
    return acl.chmod(access, mode if os.geteuid() == 0 else mode | stat.S_IRWXU)


def on_disk_owner(fs: Overlay, node: Node) -> tuple[int, int]:
    """(uid, gid) of a node as its layer means them, before any translation."""
    with objects.reached(fs, node) as fd:
        uid, gid, _, _ = on_disk(objects.layer_of(fs, node), fd, os.fstat(fd))
    return uid, gid
