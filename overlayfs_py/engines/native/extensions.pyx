# cython: language_level=3, annotation_typing=False
"""What follows the names of a request that makes something: the security labels the new object is to have.

Extensions are records in a row, each of a multiple of eight bytes: struct fuse_secctx_header with labels (where its
second word is at most 31, which is their number), else struct fuse_ext_header of a type. Source: fs/fuse/dir.c
(get_security_context, get_create_ext), include/uapi/linux/fuse.h.

Their length is in the request's header as of 7.38. The kernels of 7.36 and 7.37 (Linux 5.17 to 6.2) sent labels already:
all that is behind the names.

Labels are asked for only where an option says so. SELinux tells a label that follows from the directory's in the mount,
which is one for the whole filesystem unless the policy has it labelled by xattrs (selinux_dentry_init_security): stored
without that it would be wrong for all who use the upper layer otherwise. By default a new file gets the label that its
directory in the upper layer gives it.

The other extension there is, the caller's supplementary group that owns the directory (FUSE_CREATE_SUPP_GROUP, Linux
6.3), is not asked for: it can change nothing here. It tells whether a new file in a set-group-ID directory may keep its
own set-group-ID bit. Since Linux 6.0 the VFS has decided that before FUSE is called (mode_strip_sgid), and a daemon
that is root keeps the mode it is told.
"""

import errno

from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.session cimport Request, Session

from overlayfs_py.core.requests import Caller

cdef extern from "string.h" nogil:
    size_t strnlen(const char* text, size_t limit)

cdef enum:
    MAX_LABELS = 31  # FUSE_MAX_NR_SECCTX
    MAX_KEY = 255  # bytes, XATTR_NAME_MAX
    COUNTED_SINCE = 38  # the minor version that brought total_extlen

# struct fuse_secctx_header and struct fuse_ext_header
cdef struct record:
    uint32_t size
    uint32_t kind

# struct fuse_secctx
cdef struct secctx:
    uint32_t size
    uint32_t padding


cdef object maker(Session s, Request r, uint32_t umask):
    """Who makes something, with the labels it is to get; EIO for what the kernel doesn't send.

    To be called when the request's names have been taken.
    """
    if not s.security_label:
        return r.caller(umask)
    if s.minor < COUNTED_SINCE:
        if r.opcode == protocol.TMPFILE:
            # It has a name that nobody asks for.
            r.name()
        return Caller(r.uid, r.gid, r.pid, umask, labels(r.data, r.size))
    return Caller(r.uid, r.gid, r.pid, umask, labels(r.extensions, r.extensions_size))


cdef tuple labels(const char* at, size_t size):
    """The labels in `size` bytes of extensions, as (key, value)."""
    cdef record head
    cdef bint seen = False
    found = ()
    while size > 0:
        if size < sizeof(record):
            raise nonsense()
        memcpy(&head, at, sizeof(record))
        if head.size < sizeof(record) or head.size > size or head.size % 8:
            raise nonsense()
        if head.kind <= MAX_LABELS:
            if seen:
                raise nonsense()
            seen = True
            found = labels_of(at + sizeof(record), head.size - sizeof(record), head.kind)
        at += head.size
        size -= head.size
    return found


cdef tuple labels_of(const char* at, size_t size, uint32_t count):
    cdef secctx head
    cdef size_t length
    cdef size_t used
    found = []
    for _ in range(count):
        if size < sizeof(secctx):
            raise nonsense()
        memcpy(&head, at, sizeof(secctx))
        length = strnlen(at + sizeof(secctx), size - sizeof(secctx))
        used = sizeof(secctx) + length + 1
        if length == 0 or length > MAX_KEY or used > size or head.size > size - used:
            raise nonsense()
        key = at[sizeof(secctx) : sizeof(secctx) + length]
        # Nothing else is a label, and might be a mark of ours.
        if not key.startswith(b"security."):
            raise nonsense()
        found.append((key, at[used : used + head.size]))
        used = (used + head.size + 7) & ~<size_t>7
        if used > size:
            raise nonsense()
        at += used
        size -= used
    if size:
        raise nonsense()
    return tuple(found)


cdef object nonsense():
    return OSError(errno.EIO, "extensions that make no sense")
