# cython: language_level=3, annotation_typing=False
"""Requests about what an object is: its attributes and flags, the target of a link, extended attributes, the filesystem."""

import errno
import os
import stat

from libc.errno cimport ENODATA, ENOTTY
from libc.stdint cimport INT64_MAX, uint32_t
from libc.string cimport memcpy, memset

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.answers cimport (
    get_time, put_attr, put_attr_out, put_bytes, put_size, put_sized, put_stat, put_statx, put_validity
)
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport DEFERRED, UNLOCKED, Request, Session, serves

from overlayfs_py.core import flags
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.requests import Changes
from overlayfs_py.engines import machine
from overlayfs_py.engines.native.session import NeverAsk, nothing
from overlayfs_py.sys.files import NOW

cdef enum:
    DIRECTORY = 0o040000
    REGULAR = 0o100000

# Before Linux 5.13, FUSE passed on whatever anybody wanted to be set: there it is for root alone.
cdef bint kernel_checks_flags = machine.release() >= (5, 13)


cdef Py_ssize_t do_getattr(Session s, Request r) except -2:
    read_attributes(s, s.node(r.nodeid), <protocol.attr_out*>r.out)
    return sizeof(protocol.attr_out)


cdef read_attributes(Session s, Node node, protocol.attr_out* out):
    cdef stat_t own
    put_validity(s, node.id, out)
    if s.plain.attributes(node, &own):
        put_stat(&out.attr, node, &own)
    else:
        put_attr(&out.attr, OPERATIONS["getattr"](s.fs, node))


cdef Py_ssize_t do_statx(Session s, Request r) except -2:
    cdef protocol.statx_out* out = <protocol.statx_out*>r.out
    cdef protocol.attr_out basic
    cdef Node node = s.node(r.nodeid)
    read_attributes(s, node, &basic)
    memset(out, 0, sizeof(protocol.statx_out))
    out.attr_valid, out.attr_valid_nsec = basic.attr_valid, basic.attr_valid_nsec
    put_statx(&out.stat, &basic.attr)
    if s.plain.birth(node, &out.stat.btime.tv_sec, &out.stat.btime.tv_nsec):
        out.stat.mask |= protocol.STATX_BTIME
    return sizeof(protocol.statx_out)


cdef Py_ssize_t do_setattr(Session s, Request r) except -2:
    """Change attributes. A change of nothing is one of two things that the kernel asks for in the same words.

    It is chown(-1, -1), which takes set-id bits from a file, or comes before a write: there root's leaves them, and the
    write of anybody else takes them itself, unless the file is passed through and the write never comes here. Root's is
    known by the capabilities removed just before; only the owner's and root's chown would be allowed to take anything.
    """
    cdef protocol.setattr_in* op = <protocol.setattr_in*>r.op
    # The time of a change is not to be set: with write-back caching, the kernel would have its own.
    cdef uint32_t valid = op.valid & ~<uint32_t>protocol.FATTR_CTIME
    cdef Node node = s.node(r.nodeid)
    cdef protocol.attr_out* out = <protocol.attr_out*>r.out
    cdef stat_t own
    if valid & protocol.FATTR_SIZE and op.size > INT64_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if s.direct.change(node, op, &own):
        put_validity(s, r.nodeid, out)
        put_stat(&out.attr, node, &own)
        return sizeof(protocol.attr_out)
    clears = valid == 0 or bool(valid & protocol.FATTR_KILL_SUIDGID)
    changes = Changes(
        stat.S_IMODE(op.mode) if valid & protocol.FATTR_MODE else None,
        op.uid if valid & protocol.FATTR_UID else None,
        op.gid if valid & protocol.FATTR_GID else None,
        op.size if valid & protocol.FATTR_SIZE else None,
        None if not valid & protocol.FATTR_ATIME
        else NOW if valid & protocol.FATTR_ATIME_NOW else get_time(op.atime, op.atimensec),
        None if not valid & protocol.FATTR_MTIME
        else NOW if valid & protocol.FATTR_MTIME_NOW else get_time(op.mtime, op.mtimensec),
        clear_set_ids=clears,
        in_group=r.in_group(s) if clears else None,
    )
    if valid == 0:
        taken, s.capability_taken = s.capability_taken, None
        if node.kind == DIRECTORY or taken == (r.nodeid, r.pid):
            changes = Changes()
        elif not s.through.grows_old(r.nodeid) and r.asker() not in (0, OPERATIONS["getattr"](s.fs, node).uid):
            return do_getattr(s, r)
    return s.run(r, OPERATIONS["setattr"](s.fs, node, changes), _attributes)


cdef Py_ssize_t do_readlink(Session s, Request r) except -2:
    return put_bytes(r, OPERATIONS["readlink"](s.fs, s.node(r.nodeid)))


def _attributes(Session session, Request request, value):
    return put_attr_out(session, request, value)


cdef Py_ssize_t do_statfs(Session s, Request r) except -2:
    cdef protocol.kstatfs* out = <protocol.kstatfs*>r.out
    found = OPERATIONS["statfs"](s.fs)
    memset(out, 0, sizeof(protocol.kstatfs))
    out.blocks = found.f_blocks
    out.bfree = found.f_bfree
    out.bavail = found.f_bavail
    out.files = found.f_files
    out.ffree = found.f_ffree
    out.bsize = found.f_bsize
    out.namelen = found.f_namemax
    out.frsize = found.f_frsize
    return sizeof(protocol.kstatfs)


cdef need_xattrs(Session s):
    if s.fs.config.noxattrs:
        raise NeverAsk(errno.ENOSYS, "")


cdef Py_ssize_t do_getxattr(Session s, Request r) except -2:
    need_xattrs(s)
    cdef uint32_t wanted = (<protocol.getxattr_in*>r.op).size
    cdef Node node = s.node(r.nodeid)
    cdef Py_ssize_t length
    key = r.name()
    # The kernel asks for security.capability before the first write to any file.
    length = s.plain.xattr(node, key, r.out, min(<size_t>wanted, r.room))
    if length >= 0:
        return length if wanted else put_size(r, length)
    if length == -ENODATA:
        r.error = errno.ENODATA
        return 0
    if key.startswith(b"system.posix_acl_") and not s.fs.config.noacl and s.plain.bare(node):
        # Whoever copies a tree asks each file for its ACLs.
        r.error = errno.ENODATA
        return 0
    return put_sized(r, wanted, OPERATIONS["getxattr"](s.fs, node, key))


cdef Py_ssize_t do_listxattr(Session s, Request r) except -2:
    need_xattrs(s)
    cdef uint32_t wanted = (<protocol.getxattr_in*>r.op).size
    cdef Node node = s.node(r.nodeid)
    # Engines that compare trees ask this of each file, and hardly one has any.
    if s.plain.bare(node):
        return put_sized(r, wanted, b"")
    keys = OPERATIONS["listxattr"](s.fs, node, trusted=True)
    if any(key.startswith(b"trusted.") for key in keys) and r.asker() != 0:
        keys = [key for key in keys if not key.startswith(b"trusted.")]
    return put_sized(r, wanted, b"".join([key + b"\0" for key in keys]))


cdef Py_ssize_t do_setxattr(Session s, Request r) except -2:
    need_xattrs(s)
    cdef protocol.setxattr_in* op = <protocol.setxattr_in*>r.op
    key = r.name()
    if op.size > r.size:
        raise OSError(errno.EIO, "a value cut short")
    clear_sgid = s.long_setxattr and bool(op.setxattr_flags & protocol.SETXATTR_ACL_KILL_SGID)
    node = s.node(r.nodeid)
    if not clear_sgid and s.direct.set_xattr(node, key, r.data, op.size, op.flags):
        return 0
    steps = OPERATIONS["setxattr"](s.fs, node, key, r.data[: op.size], op.flags, clear_sgid=clear_sgid)
    return s.run(r, steps, nothing)


cdef Py_ssize_t do_removexattr(Session s, Request r) except -2:
    need_xattrs(s)
    key = r.name()
    if key == b"security.capability":
        s.capability_taken = (r.nodeid, r.pid)
    return s.run(r, OPERATIONS["removexattr"](s.fs, s.node(r.nodeid), key), nothing)


cdef Py_ssize_t do_ioctl(Session s, Request r) except -2:
    cdef protocol.ioctl_in* op = <protocol.ioctl_in*>r.op
    if op.cmd in flags.READING:
        with s.lock:
            found = OPERATIONS["get_flags"](s.fs, s.node(r.nodeid), op.cmd, op.out_size)
        put_ioctl(s, r, 0)
        memcpy(r.out + sizeof(protocol.ioctl_out), <char*>found, len(found))
        return sizeof(protocol.ioctl_out) + len(found)
    if op.cmd in flags.WRITING:
        if op.in_size > r.size:
            raise OSError(errno.EIO, "a value cut short")
        # What was stored through a mapping while that was allowed is not to be refused.
        s.flushing.submit(s._answer, r, _flush_and_set_flags, (s, r))
        return DEFERRED
    # Never ENOSYS: the kernel's overlayfs must be able to use this mount as a lower layer. Whatever Python opens it asks
    # for a terminal's settings, so this is no place for an exception.
    r.error = ENOTTY
    return 0


def _flush_and_set_flags(Session s, Request r):
    cdef protocol.ioctl_in* op = <protocol.ioctl_in*>r.op
    if not kernel_checks_flags and r.asker() != 0:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    with s.lock:
        node = s.node(r.nodeid)
    if node.kind == REGULAR:
        s.through.forget(r.nodeid, 0)
    with s.lock:
        return s.run(r, OPERATIONS["set_flags"](s.fs, node, op.cmd, r.data[: op.in_size]), put_ioctl)


def put_ioctl(Session session, Request request, value):
    memset(request.out, 0, sizeof(protocol.ioctl_out))
    return sizeof(protocol.ioctl_out)


serves(protocol.GETATTR, do_getattr, 16, 0)
serves(protocol.STATX, do_statx, sizeof(protocol.statx_in), 0)
serves(protocol.SETATTR, do_setattr, sizeof(protocol.setattr_in), 0)
serves(protocol.READLINK, do_readlink, 0, 0)
serves(protocol.STATFS, do_statfs, 0, 0)
serves(protocol.GETXATTR, do_getxattr, sizeof(protocol.getxattr_in), 0)
serves(protocol.LISTXATTR, do_listxattr, sizeof(protocol.getxattr_in), 0)
serves(protocol.SETXATTR, do_setxattr, sizeof(protocol.setxattr_in), 0)
serves(protocol.REMOVEXATTR, do_removexattr, 0, 0)
serves(protocol.IOCTL, do_ioctl, sizeof(protocol.ioctl_in), UNLOCKED)
