from libc.stdint cimport uint32_t, uint64_t

from overlayfs_py.engines.native.plain cimport Plain


cdef class Request:
    cdef uint64_t unique
    cdef uint64_t nodeid
    cdef uint32_t opcode
    cdef uint32_t uid
    cdef uint32_t gid
    cdef uint32_t pid
    # What the operation has: its own structure, and the names or bytes behind it.
    cdef char* op
    cdef char* data
    cdef size_t size
    # Where the answer goes, behind its header.
    cdef char* out
    cdef size_t room
    cdef Py_ssize_t length
    cdef int error
    cdef object transport


    cdef bytes name(self)
    cdef object caller(self, uint32_t umask)


cdef size_t op_size(uint32_t opcode)


cdef class Session:
    cdef readonly object fs
    cdef object lock
    cdef object pool
    cdef object running
    cdef object listings
    cdef Plain plain
    cdef uint64_t timeout
    cdef uint32_t timeout_nsec
    cdef readonly size_t max_write
    # Bytes of the longest request, without its header, and of the longest answer.
    cdef readonly size_t payload
    cdef readonly object minor
    cdef bint want_uring
    cdef bint keeps_atimes
    cdef bint only_root
    # Whether kernel and engine agreed on rings in INIT.
    cdef readonly bint uring

    cdef bint handle(self, Request r)
    cdef fail(self, Request r, object error)
    cdef Py_ssize_t run(self, Request r, object steps, object finish) except -2
    cdef object advance(self, object steps)
    cdef object owns(self, object job)
    cdef object node(self, uint64_t node_id)
