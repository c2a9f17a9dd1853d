from libc.stdint cimport uint32_t

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.plain cimport Plain, stat
from overlayfs_py.engines.native.session cimport Request

# struct __user_cap_data_struct, two times, as capset(2) takes it: effective, permitted, inheritable.
cdef struct cap_sets:
    uint32_t word[6]


cdef class Direct:
    cdef object fs
    cdef object dirs
    cdef object work
    cdef object lock
    cdef Plain plain
    # Whether the upper layer keeps what is made in it just as it was asked for.
    cdef bint on
    # Whether files take the place of whiteouts, and whiteouts theirs, in the same way.
    cdef bint stages
    cdef uint32_t uid
    cdef uint32_t gid
    # Whether a thread can make files as another user's, and what it may do then, which is what it may do anyway.
    cdef bint acts
    cdef cap_sets sets
    # Whether each thread that serves has a umask of its own.
    cdef bint side_by_side

    cdef int _make(self, Request r, int dir_fd, bytes name, uint32_t mode, uint32_t umask, stat* st, bint own)
    cdef int _make_in_place(self, int dir_fd, bytes name, uint32_t mode, uint32_t umask, stat* st) except? -1
    cdef Node create(self, Request r, Node parent, bytes name, uint32_t mode, uint32_t umask, stat* st)
    cdef bint change(self, Node node, protocol.setattr_in* op, stat* st) except -1
    cdef bint set_xattr(self, Node node, bytes key, const char* value, size_t size, int flags) except -1
    cdef bint remove(self, Node parent, bytes name, bint directory) except -1
    cdef bint rename(self, Node old_parent, bytes old_name, Node new_parent, bytes new_name) except -1
    cdef bint _is_writable(self, Node parent) except -1
    cdef bint _is_here(self, Node node, Node parent, bytes name)
    cdef bint _may_go(self, Node node, Node parent, bytes name) except -1
    cdef bint _is_single(self, Node node) except -1
    cdef bint _pin(self, Node node, int dir_fd, bytes name, int* pinned) except -1
    cdef bint _hide(self, Node node, Node parent, bytes name) except -1
    cdef int _put_whiteout(self, int dir_fd, bytes name)
    cdef bint _is_own(self, Node node)
