from libc.stdint cimport uint64_t

from overlayfs_py.core.nodes cimport Node, Real
from overlayfs_py.engines.native.plain cimport Plain, dirent64, record


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    SLOTS = 6

cdef struct slot:
    int state
    int fd
    uint64_t stamp
    char* memory
    size_t used


cdef class Prepared:
    cdef char* memory
    cdef dict places

    cdef list names(self)
    cdef record* find(self, bytes name)


cdef class Ahead:
    cdef Plain plain
    cdef bint on
    # Held by the thread for as long as it runs.
    cdef object running
    cdef dict expected
    cdef list reals
    cdef int hits
    cdef uint64_t stamp
    cdef bint ended
    cdef const char* prefix
    cdef size_t prefix_length
    cdef slot slots[SLOTS]
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed

    cdef Prepared visit(self, Node node)
    cdef expect(self, list directories)
    cdef Prepared _take(self, Real real)
    cdef bint _begin(self) except -1
    cdef bint _is_plain(self, Node node)
    cdef _read_next(self)
    cdef _queue(self, Node node)
    cdef void _fill(self, slot* one) noexcept nogil
    cdef bint _note(self, slot* one, dirent64* name) noexcept nogil
