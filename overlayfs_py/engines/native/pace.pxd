from libc.stdint cimport int64_t, uint64_t

from overlayfs_py.engines.native.background cimport Background, pthread_cond_t

cdef enum:
    # Requests between two looks at the clock.
    LOOK = 16


cdef class Pace(Background):
    # cpu_dma_latency, through which the kernel is told; -1 where it never is.
    cdef int fd
    cdef int fuse_fd
    # How many requests have come, and when LOOK of them had last, in nanoseconds.
    cdef uint64_t count
    cdef int64_t looked
    # Whether the thread is to tell the kernel, and goes on until few requests come.
    cdef bint busy
    # Whether one thread is to fetch requests alone, how many wait for one at the moment, and until when all are to, and
    # for how long by then.
    cdef bint alone
    cdef int fetching
    cdef int64_t shared_until
    cdef int64_t shared
    # How many of the last looks found another request waiting.
    cdef int waiting
    cdef bint many_processors
    # How sure it is that the next request comes at once: that is looked for where this is above 0. Below, it counts what
    # has been slept for since.
    cdef int hopes
    # What those wait for that stand by.
    cdef pthread_cond_t others

    # Whether there are helpers, what begins one, how many more there may be, and after when; whether somebody found that
    # nobody fetches requests; how many helpers stand by, how many of them are called, and what they wait for.
    cdef bint helped
    cdef object begin
    cdef int to_begin
    cdef int64_t begin_after
    cdef bint guarded
    cdef int standing_by
    cdef int called
    cdef pthread_cond_t helpers

    cdef inline note(self):
        """Note that a request has come."""
        self.count += 1
        if self.fd >= 0 and not self.busy and self.count % LOOK == 0:
            self._look()
        if self.helped and self.fetching == 0 and not self.busy and not self.guarded:
            self._have_guarded()

    cdef void fetch(self, bint helper) noexcept nogil
    cdef void fetched(self) noexcept nogil
    cdef bint is_worth_looking(self) noexcept nogil
    cdef void has_looked(self, bint found) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void took(self, int64_t nanoseconds, size_t size) noexcept nogil
    cdef void _share(self) noexcept nogil
    cdef void _share_a_while(self) noexcept nogil
    cdef _look(self)
    cdef _have_guarded(self)
    cdef void _have(self, bint* wanted) noexcept nogil
    cdef void _keep_awake(self) noexcept nogil
    cdef void _guard(self) noexcept nogil
    cdef void _rest(self) noexcept nogil
    cdef void _call_helper(self) noexcept nogil
    cdef void _begin_helper(self) noexcept
    cdef void _call_others(self) noexcept nogil
    cdef bint _tell(self, int latency) noexcept nogil


cdef bint is_waiting(int fuse_fd, int milliseconds) noexcept nogil
cdef int64_t monotonic() noexcept nogil
