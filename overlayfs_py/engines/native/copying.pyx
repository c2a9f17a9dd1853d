# cython: language_level=3, annotation_typing=False
"""Requests to copy from one file of the mount to another one."""

import os

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uint64_t

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.files cimport take_set_ids
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport Request, Session, serves

from overlayfs_py.core.copyup import IN_PLACE_BYTES
from overlayfs_py.core.ops import OPERATIONS

cdef extern from "<sys/stat.h>" nogil:
    int fstat(int fd, stat_t* st)

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t copy_file_range(int in_fd, int64_t* off_in, int out_fd, int64_t* off_out, size_t length, unsigned flags)

cdef size_t IN_PLACE = IN_PLACE_BYTES


cdef Py_ssize_t copy_in_place(Session s, Request r) except -2:
    """Copy a few bytes to a file of the upper layer; -1 leaves it to core, which does the same in more time."""
    cdef protocol.copy_file_range_in* op = <protocol.copy_file_range_in*>r.op
    cdef Node source = s.node(r.nodeid)
    cdef Node target = s.node(op.nodeid_out)
    cdef stat_t st
    cdef int64_t off_in = op.off_in
    cdef int64_t off_out = op.off_out
    cdef size_t length = op.len
    cdef Py_ssize_t count
    if target.upper is None and target.pinned < 0 or target.metacopy or source.metacopy or off_in < 0 or off_out < 0:
        return -1
    reading, writing = s.fs.files.held(source, write=False), s.fs.files.held(target, write=True)
    cdef int from_fd = reading.fd
    cdef int to_fd = writing.fd
    if fstat(from_fd, &st) != 0 or (length > IN_PLACE and st.st_size - off_in > <int64_t>IN_PLACE):
        return -1
    with nogil:
        count = copy_file_range(from_fd, &off_in, to_fd, &off_out, length, 0)
    if count < 0:
        raise OSError(errno, os.strerror(errno))
    take_set_ids(s, r, target)
    return count


cdef object copy_steps(Session s, Request r):
    cdef protocol.copy_file_range_in* op = <protocol.copy_file_range_in*>r.op
    source, target = s.node(r.nodeid), s.node(op.nodeid_out)
    return OPERATIONS["copy_file_range"](s.fs, source, <int64_t>op.off_in, target, <int64_t>op.off_out, op.len)


cdef Py_ssize_t do_copy_file_range(Session s, Request r) except -2:
    cdef protocol.write_out* out = <protocol.write_out*>r.out
    cdef Py_ssize_t count = copy_in_place(s, r)
    if count >= 0:
        out.size, out.padding = <uint32_t>count, 0
        return sizeof(protocol.write_out)
    (<protocol.copy_file_range_in*>r.op).len = min((<protocol.copy_file_range_in*>r.op).len, <uint64_t>0x7FFFF000)
    return s.run(r, copy_steps(s, r), _copied)


def _copied(session, Request request, value):
    cdef protocol.write_out* out = <protocol.write_out*>request.out
    copied(session, request)
    out.size, out.padding = value, 0
    return sizeof(protocol.write_out)


cdef copied(Session s, Request r):
    take_set_ids(s, r, s.node((<protocol.copy_file_range_in*>r.op).nodeid_out))


cdef Py_ssize_t do_copy_file_range_64(Session s, Request r) except -2:
    cdef Py_ssize_t count = copy_in_place(s, r)
    if count >= 0:
        (<protocol.copy_file_range_out*>r.out).bytes_copied = count
        return sizeof(protocol.copy_file_range_out)
    return s.run(r, copy_steps(s, r), _copied_64)


def _copied_64(session, Request request, value):
    copied(session, request)
    (<protocol.copy_file_range_out*>request.out).bytes_copied = value
    return sizeof(protocol.copy_file_range_out)


serves(protocol.COPY_FILE_RANGE, do_copy_file_range, sizeof(protocol.copy_file_range_in), 0)
serves(protocol.COPY_FILE_RANGE_64, do_copy_file_range_64, sizeof(protocol.copy_file_range_in), 0)
