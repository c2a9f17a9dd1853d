from libc.stdint cimport uint64_t

from overlayfs_py.core.nodes cimport Node, Real
from overlayfs_py.engines.native.background cimport Background
from overlayfs_py.engines.native.plain cimport Plain, dirent64, record

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


cdef class Ahead(Background):
    cdef Plain plain
    cdef bint on
    cdef dict expected
    cdef list reals
    cdef int hits
    cdef uint64_t stamp
    cdef const char* prefix
    cdef size_t prefix_length
    cdef slot slots[SLOTS]

    cdef Prepared visit(self, Node node)
    cdef expect(self, list directories)
    cdef Prepared _take(self, Real real)
    cdef bint _is_plain(self, Node node)
    cdef _read_next(self)
    cdef _queue(self, Node node)
    cdef void _fill(self, slot* one) noexcept nogil
    cdef bint _note(self, slot* one, dirent64* name) noexcept nogil
