"""Changing attributes and extended attributes: copy up, then change the upper object."""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import acl, copyup, objects, owners, protection
from overlayfs_py.core.create import ACL_ACCESS, ACL_DEFAULT
from overlayfs_py.core.ids import OVERRIDE_KEYS
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.requests import Attr, Caller, Changes, Steps
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import files, xattrs

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

_ACLS = (ACL_ACCESS, ACL_DEFAULT)
# The kernel removes it before it writes, whether there is one or not.
_CAPABILITY = b"security.capability"


def getattr(fs: Overlay, node: Node) -> Attr:
    """The attributes the mount shows of a node."""
    return objects.attr(fs, node)


def setattr(fs: Overlay, node: Node, changes: Changes) -> Steps[Attr]:
    """chmod, chown, truncate and utimensat in one; the kernel has checked that the caller may.

    Raises what those raise, and what copying up raises; then nothing is changed.
    """
    fs.writable()
    protection.check(fs, node, _forbidden_by(fs, changes))
    truncated = yield from copyup.copy_up(fs, node, data=changes.size is not None, size=changes.size)
    if changes.size is not None and not truncated:
        fd = fs.files.fd(node, write=True)
        os.ftruncate(fd, changes.size)
    if _change_by_name(fs, node, changes):
        return objects.attr(fs, node)
    with objects.reached(fs, node) as fd:
        mode = changes.mode
        if changes.clear_set_ids and mode is None:
            mode = owners.without_set_ids(fs, fd, changes.in_group)
        if changes.uid is not None or changes.gid is not None or mode is not None:
            if mode is not None and node.kind == stat.S_IFLNK:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            owners.change(fs, fd, uid=changes.uid, gid=changes.gid, mode=mode)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            files.futimens(fd, changes.atime_ns, changes.mtime_ns)
    return objects.attr(fs, node)


def _forbidden_by(fs: Overlay, changes: Changes) -> int:
    """The flags with which a file can't be changed so: to be touched it may be append-only (may_setattr in fs/attr.c).

    A time of a change alone is what a kernel that gathers writes sends after them.
    """
    times = (changes.atime_ns, changes.mtime_ns)
    if any(value is not None for value in (changes.mode, changes.uid, changes.gid, changes.size)):
        return protection.BOTH
    if times == (None, None) or (fs.config.writeback and changes.atime_ns is None):
        return 0
    return protection.IMMUTABLE if times == (files.NOW, files.NOW) else protection.BOTH


def _change_by_name(fs: Overlay, node: Node, changes: Changes) -> bool:
    """Do most changes without opening the object, which would take half of the time; False leaves it to the caller."""
    upper = node.upper
    assert fs.upper is not None
    if upper is None or upper.parent is None or fs.upper.override is not None or changes.clear_set_ids:
        return False
    if node.pinned >= 0 or not fs.ids.identity or (changes.mode is not None and node.kind == stat.S_IFLNK):
        return False
    dir_fd = fs.dirs.fd(upper.parent)
    if changes.uid is not None or changes.gid is not None:
        uid, gid = (-1 if number is None else number for number in (changes.uid, changes.gid))
        files.chown_at(dir_fd, upper.name, uid, gid)
    if changes.mode is not None:
        files.chmod_at(dir_fd, upper.name, changes.mode)
    if changes.atime_ns is not None or changes.mtime_ns is not None:
        files.utimens(dir_fd, upper.name, changes.atime_ns, changes.mtime_ns)
    return True


def readlink(fs: Overlay, node: Node) -> bytes:
    """The target of a symbolic link; EINVAL for anything else."""
    with objects.reached(fs, node) as fd:
        return os.readlink(b"", dir_fd=fd)


def getxattr(fs: Overlay, node: Node, key: bytes) -> bytes:
    """The value of an extended attribute. Raises ENODATA; EOPNOTSUPP for ACLs in a mount without."""
    if fs.config.noacl and key in _ACLS:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if _keeps_owner(fs, node, key):
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    with objects.reached(fs, node) as fd:
        try:
            value = xattrs.fget(fd, fs.marks.to_disk(key))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and key in _ACLS:
                # A layer that can hold no ACL has none. FUSE in the kernel takes any other answer for a failure.
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from error
            raise
    if key == ACL_ACCESS and objects.layer_of(fs, node).override is not None:
        # The file's own mode is another, and where the daemon isn't root the ACL agrees with that.
        value = acl.chmod(value, objects.attr(fs, node).mode)
    if key in _ACLS and not fs.ids.identity:
        return _mapped(value, fs.ids.uid_to_shown, fs.ids.gid_to_shown)
    return value


def listxattr(fs: Overlay, node: Node, *, trusted: bool = True) -> list[bytes]:
    """The names of all extended attributes, without the overlay's own; without `trusted`, without trusted.* ones too,
    which only a caller with CAP_SYS_ADMIN may see (xattr(7))."""
    with objects.reached(fs, node) as fd:
        try:
            keys = xattrs.flist(fd)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # a layer without xattrs
            return []
    return [
        fs.marks.to_shown(key)
        for key in keys
        if not fs.marks.hidden(key)
        and not _keeps_owner(fs, node, key)
        and not (fs.config.noacl and key in _ACLS)
        and (trusted or not key.startswith(b"trusted."))
    ]


def _keeps_owner(fs: Overlay, node: Node, key: bytes) -> bool:
    """Whether an xattr is the one in which the node's layer has owner and mode, which the mount doesn't show."""
    return key == objects.layer_of(fs, node).override


def _check_key(fs: Overlay, node: Node, key: bytes) -> None:
    """Raise EPERM for an xattr by which whoever may write a file could give it another owner, or set-id bits.

    In the root it would say so of a whole layer, once that is mounted again.
    """
    assert fs.upper is not None
    if key == fs.upper.override or (node.parent is None and key in OVERRIDE_KEYS):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def setxattr(
    fs: Overlay, node: Node, key: bytes, value: bytes, flags: int = 0, *, clear_sgid: bool = False
) -> Steps[None]:
    """Set an extended attribute; `flags` are XATTR_CREATE (EEXIST if there) and XATTR_REPLACE (ENODATA if not).

    `clear_sgid` takes set-group-id with it, see acl_clears_sgid.
    """
    if key in _ACLS:
        if fs.config.noacl:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if not fs.ids.identity:
            value = _mapped(value, fs.ids.uid_to_disk, fs.ids.gid_to_disk)
    fs.writable()
    _check_key(fs, node, key)
    protection.check(fs, node)
    disk_key = fs.marks.to_disk(key)
    _check_flags(fs, node, key, flags)
    yield from copyup.copy_up(fs, node, data=False)
    with objects.reached(fs, node) as fd:
        if key == ACL_ACCESS and fs.upper is not None and fs.upper.override is not None:
            try:
                owners.set_acl(fs.upper.override, fd, value, flags)
            except ValueError as error:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from error
        else:
            xattrs.fset(fd, disk_key, value, flags)
        if clear_sgid and key == ACL_ACCESS:
            # The kernel asks for it with either ACL.
            owners.clear_sgid(fs, fd)


def acl_clears_sgid(fs: Overlay, caller: Caller, node: Node, key: bytes) -> bool:
    """Whether setting this xattr clears set-group-id: an access ACL does, set by someone outside the owning group
    (acl(5); posix_acl_update_mode in the kernel)."""
    if key != ACL_ACCESS or caller.uid == 0:
        return False
    shown = objects.attr(fs, node)
    return bool(shown.mode & stat.S_ISGID) and shown.gid not in caller_groups(caller)


def _check_flags(fs: Overlay, node: Node, key: bytes, flags: int) -> None:
    """Refuse before copying up what the flags will refuse after it."""
    if not flags:
        return
    with objects.reached(fs, node) as fd:
        try:
            xattrs.fget(fd, fs.marks.to_disk(key))
            present = not _keeps_owner(fs, node, key)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            present = False
    if flags & os.XATTR_CREATE and present:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    if flags & os.XATTR_REPLACE and not present:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def removexattr(fs: Overlay, node: Node, key: bytes) -> Steps[None]:
    """Remove an extended attribute; where there is none, nothing is copied up, and it is ENODATA unless it is an ACL.

    Removing an ACL that is not there succeeds, as it does for the kernel's own filesystems (posix_acl_set).
    """
    disk_key = fs.marks.to_disk(key)
    fs.writable()
    _check_key(fs, node, key)
    if key != _CAPABILITY:
        protection.check(fs, node)
    with objects.reached(fs, node) as fd:
        try:
            xattrs.fget(fd, disk_key)
        except OSError as error:
            if error.errno == errno.ENODATA and key in _ACLS:
                return
            raise
    if _keeps_owner(fs, node, key):
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    protection.check(fs, node)
    yield from copyup.copy_up(fs, node, data=False)
    with objects.reached(fs, node) as fd:
        xattrs.fremove(fd, disk_key)


def caller_groups(caller: Caller) -> set[int]:
    """All groups of the calling process; its own only, where it has gone meanwhile (proc(5), /proc/PID/status)."""
    groups = {caller.gid}
    try:
        with open(f"/proc/{caller.pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Groups:"):
                    groups.update(int(word) for word in line.split()[1:])
    except (FileNotFoundError, ProcessLookupError):
        return groups
    return groups


def _mapped(value: bytes, uid: owners.Translate, gid: owners.Translate) -> bytes:
    try:
        return acl.map_ids(value, uid, gid)
    except ValueError as error:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from error
