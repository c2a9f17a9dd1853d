from libc.stdint cimport int64_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    int RWF_NOWAIT
    Py_ssize_t preadv2(int fd, const iovec* parts, int count, int64_t offset, int flags)


cdef class Pipes:
    # Those that are free, and how many more there may be.
    cdef list free
    cdef int to_make
    # The least bytes of a file that are sent through one, beyond all where none may be.
    cdef size_t least

    cdef Pipe take(self)
    cdef give(self, Pipe pipe)


cdef class Pipe:
    cdef int reading
    cdef int writing
    # The most bytes of a file that it takes behind a header.
    cdef size_t room

    cdef bint send(self, int fuse_fd, uint64_t unique, int fd, int64_t offset, size_t size) noexcept nogil
    cdef bint _fill(self, uint64_t unique, int fd, int64_t offset, size_t size) noexcept nogil
    cdef void _drain(self) noexcept nogil


cdef bint is_cached(int fd, int64_t offset, size_t size) noexcept nogil
