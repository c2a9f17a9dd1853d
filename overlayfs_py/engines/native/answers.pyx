# cython: language_level=3, annotation_typing=False
"""What answers are made of: core's values in the protocol's structures."""

import errno
import os

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport Request, Session

from overlayfs_py.core.objects import attr as shown_attr
from overlayfs_py.core.ops import OPERATIONS

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow) except? -1


cdef void put_attr(protocol.attr_t* out, object shown):
    cdef uint64_t rdev = shown.rdev
    out.ino = shown.ino
    out.size = shown.size
    out.blocks = shown.blocks
    put_time(shown.atime_ns, &out.atime, &out.atimensec)
    put_time(shown.mtime_ns, &out.mtime, &out.mtimensec)
    put_time(shown.ctime_ns, &out.ctime, &out.ctimensec)
    out.mode = shown.mode
    out.nlink = shown.nlink
    out.uid = shown.uid
    out.gid = shown.gid
    out.rdev = encode_device(rdev)
    out.blksize = shown.blksize
    out.flags = 0


cdef void put_stat(protocol.attr_t* out, Node node, stat_t* st):
    """As put_attr, of an object whose attributes are shown as they are stored."""
    out.ino = node.id
    out.size = st.st_size
    out.blocks = st.st_blocks
    out.atime, out.atimensec = <uint64_t>st.st_atim.tv_sec, <uint32_t>st.st_atim.tv_nsec
    out.mtime, out.mtimensec = <uint64_t>st.st_mtim.tv_sec, <uint32_t>st.st_mtim.tv_nsec
    out.ctime, out.ctimensec = <uint64_t>st.st_ctim.tv_sec, <uint32_t>st.st_ctim.tv_nsec
    out.mode = st.st_mode
    out.nlink = <uint32_t>st.st_nlink
    out.uid = st.st_uid
    out.gid = st.st_gid
    out.rdev = encode_device(st.st_rdev)
    out.blksize = <uint32_t>st.st_blksize
    out.flags = 0


cdef void put_statx(protocol.statx_t* out, protocol.attr_t* shown):
    """The same attributes in the structure of STATX, all but the time of birth."""
    out.mask = protocol.STATX_BASIC_STATS
    out.blksize = shown.blksize
    out.nlink = shown.nlink
    out.uid = shown.uid
    out.gid = shown.gid
    out.mode = <uint16_t>shown.mode
    out.ino = shown.ino
    out.size = shown.size
    out.blocks = shown.blocks
    out.atime.tv_sec, out.atime.tv_nsec = <int64_t>shown.atime, shown.atimensec
    out.mtime.tv_sec, out.mtime.tv_nsec = <int64_t>shown.mtime, shown.mtimensec
    out.ctime.tv_sec, out.ctime.tv_nsec = <int64_t>shown.ctime, shown.ctimensec
    out.rdev_major = (shown.rdev & 0xFFF00) >> 8
    out.rdev_minor = (shown.rdev & 0xFF) | ((shown.rdev >> 12) & 0xFFF00)


cdef void put_time(object nanoseconds, uint64_t* seconds, uint32_t* rest):
    # Times before 1970 have negative seconds, in two's complement; those after 2262 more nanoseconds than 64 bits hold.
    cdef int overflow = 0
    cdef int64_t value = PyLong_AsLongLongAndOverflow(nanoseconds, &overflow)
    cdef int64_t whole = value // 1_000_000_000
    if overflow:
        whole = nanoseconds // 1_000_000_000
        value = nanoseconds % 1_000_000_000
        seconds[0], rest[0] = <uint64_t>whole, <uint32_t>value
        return
    seconds[0] = <uint64_t>whole
    rest[0] = <uint32_t>(value - whole * 1_000_000_000)


cdef object get_time(uint64_t seconds, uint32_t rest):
    whole = <int64_t>seconds
    # Of numbers without bounds.
    return <object>whole * <object>1_000_000_000 + rest


cdef uint32_t encode_device(uint64_t device):
    """A device number as the protocol has it: the kernel's new_encode_dev."""
    cdef uint64_t major = ((device >> 8) & 0xFFF) | ((device >> 32) & 0xFFFFF000)
    cdef uint64_t minor = (device & 0xFF) | ((device >> 12) & 0xFFFFFF00)
    return <uint32_t>((minor & 0xFF) | (major << 8) | ((minor & ~<uint64_t>0xFF) << 12))


cdef object decode_device(uint32_t device):
    return os.makedev((device & 0xFFF00) >> 8, (device & 0xFF) | ((device >> 12) & 0xFFF00))


cdef Py_ssize_t put_entry_at(Session s, protocol.entry_out* out, Node node, object st) except -2:
    """An entry with a node's attributes: those core has read, else read here."""
    cdef stat_t own
    if st is None and s.plain.attributes(node, &own):
        return put_plain_entry(s, out, node, &own)
    memset(out, 0, sizeof(protocol.entry_out))
    put_attr(&out.attr, shown_attr(s.fs, node, st))
    return put_reference(s, out, node)


cdef Py_ssize_t put_plain_entry(Session s, protocol.entry_out* out, Node node, stat_t* st) except -2:
    memset(out, 0, sizeof(protocol.entry_out))
    put_stat(&out.attr, node, st)
    return put_reference(s, out, node)


cdef Py_ssize_t put_reference(Session s, protocol.entry_out* out, Node node) except -2:
    out.nodeid = node.id
    out.generation = s.generations.of(node)
    out.entry_valid, out.entry_valid_nsec = s.timeout, s.timeout_nsec
    if not s.through.grows_old(out.nodeid):
        out.attr_valid, out.attr_valid_nsec = s.timeout, s.timeout_nsec
    if s.pruning.limit:
        s.pruning.look()
    return sizeof(protocol.entry_out)


cdef Py_ssize_t put_entry(Session s, Request r, Node node) except -2:
    """The answer that gives the kernel a reference to `node`."""
    return put_found(s, r, node, None)


cdef Py_ssize_t put_found(Session s, Request r, Node node, object st) except -2:
    """As put_entry, with the attributes that core has read."""
    try:
        put_entry_at(s, <protocol.entry_out*>r.out, node, st)
    except OSError:
        let_go(s, node)
        raise
    node.lookups += 1
    return sizeof(protocol.entry_out)


cdef Py_ssize_t put_known(Session s, Request r, Node node, stat_t* st) except -2:
    """As put_entry, of an object whose attributes are shown as they are stored."""
    try:
        put_plain_entry(s, <protocol.entry_out*>r.out, node, st)
    except OSError:
        let_go(s, node)
        raise
    node.lookups += 1
    return sizeof(protocol.entry_out)


cdef let_go(Session s, Node node):
    """Of a node that the kernel gets no reference to, so that no FORGET will come."""
    OPERATIONS["forget"](s.fs, node, 0)


cdef void put_validity(Session s, uint64_t node_id, protocol.attr_out* out):
    """The head of an answer that tells a node's attributes: how long they hold."""
    memset(out, 0, sizeof(protocol.attr_out))
    if not s.through.grows_old(node_id):
        out.attr_valid, out.attr_valid_nsec = s.timeout, s.timeout_nsec


cdef Py_ssize_t put_attr_out(Session s, Request r, object shown) except -2:
    cdef protocol.attr_out* out = <protocol.attr_out*>r.out
    put_validity(s, r.nodeid, out)
    put_attr(&out.attr, shown)
    return sizeof(protocol.attr_out)


cdef Py_ssize_t put_absent(Session s, protocol.entry_out* out) except -2:
    """That there is no such name, which the kernel remembers."""
    memset(out, 0, sizeof(protocol.entry_out))
    out.entry_valid, out.entry_valid_nsec = s.timeout, s.timeout_nsec
    return sizeof(protocol.entry_out)


cdef Py_ssize_t put_bytes(Request r, bytes value) except -2:
    if <size_t>len(value) > r.room:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    memcpy(r.out, <char*>value, len(value))
    return len(value)


cdef Py_ssize_t put_sized(Request r, uint32_t wanted, bytes value) except -2:
    """A value, or only its size where the caller asks for that with a size of 0; ERANGE where it lacks room."""
    if wanted == 0:
        return put_size(r, len(value))
    if len(value) > wanted:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return put_bytes(r, value)


cdef Py_ssize_t put_size(Request r, size_t size) except -2:
    cdef protocol.getxattr_out* out = <protocol.getxattr_out*>r.out
    out.size, out.padding = <uint32_t>size, 0
    return sizeof(protocol.getxattr_out)
