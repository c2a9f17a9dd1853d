cdef class Pruning:
    cdef object by_id
    cdef object workers
    cdef int fuse_fd
    # The most nodes that are to be known, 0 for any number.
    cdef readonly Py_ssize_t limit
    cdef bint under_way

    cdef look(self)
    cdef hold_back(self)
    cdef list _oldest(self)
    cdef _send(self, list nodes)
