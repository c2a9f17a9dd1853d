from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from overlayfs_py.core.nodes cimport Node


cdef enum:
    # How a file was opened; the handle that the kernel gives back in RELEASE.
    CACHED = 1
    THROUGH = 2
    WRITING = 4

    ATTRIBUTES_ALONE = -1


cdef class Passthrough:
    cdef object fs
    cdef int fuse_fd
    cdef dict opened
    # Writing handles whose backing file the kernel writes, by node id: what it has cached of their attributes gets old.
    cdef dict writing
    # Whether kernel and engine agreed on it in INIT.
    cdef public bint on
    cdef bint warned

    cdef uint64_t open(self, Node node, uint32_t flags, int32_t* backing_id) except 0
    cdef uint64_t open_cached(self, Node node)
    cdef bint release(self, uint64_t node_id, uint64_t handle) except -1
    cdef bint grows_old(self, uint64_t node_id)
    cdef bint _may_change(self, Node node)
    cdef int _register(self, Node node)
    cdef forget(self, uint64_t node_id, int64_t offset)
    cdef _will_write(self, uint64_t node_id)
