from libc.stdint cimport int64_t, uint64_t

from overlayfs_py.engines.native.background cimport Background, pthread_cond_t

cdef enum:
    # Requests between two looks at the clock.
    LOOK = 16


cdef class Pace(Background):
    # cpu_dma_latency, through which the kernel is told; -1 where it never is.
    cdef int fd
    # How many requests have come, and when LOOK of them had last, in nanoseconds.
    cdef uint64_t count
    cdef int64_t looked
    # Whether the thread is to tell the kernel, and goes on until few requests come.
    cdef bint busy
    # Whether one thread is to fetch requests alone, how many wait for one at the moment, and until when all are to.
    cdef bint alone
    cdef int fetching
    cdef int64_t shared_until
    # How many of the last looks found another request waiting.
    cdef int waiting
    cdef bint many_processors
    cdef pthread_cond_t shared

    cdef inline note(self):
        """Note that a request has come."""
        self.count += 1
        if self.fd >= 0 and not self.busy and self.count % LOOK == 0:
            self._look()

    cdef void fetch(self) noexcept nogil
    cdef void fetched(self) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void took(self, int64_t nanoseconds, size_t size, int fuse_fd) noexcept nogil
    cdef void _share(self) noexcept nogil
    cdef _look(self)
    cdef bint _tell(self, int latency) noexcept nogil


cdef int64_t monotonic() noexcept nogil
