from libc.stdint cimport uint64_t

from overlayfs_py.core.nodes cimport Node, Real
from overlayfs_py.engines.native.background cimport Background
from overlayfs_py.engines.native.plain cimport Plain, record

cdef enum:
    SLOTS = 6

cdef struct slot:
    int state
    int fd
    uint64_t stamp
    # The names to look at, one behind the other with a NUL after each, and their bytes; NULL for all of the directory.
    char* wanted
    size_t size
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
    # What each slot is for: the directory, or the listing whose next names it is about.
    cdef list keys
    cdef int hits
    cdef uint64_t stamp
    cdef const char* prefix
    cdef size_t prefix_length
    cdef slot slots[SLOTS]

    cdef Prepared visit(self, Node node)
    cdef expect(self, list directories)
    cdef Prepared follow(self, Node node, object listing, Py_ssize_t index, Py_ssize_t own)
    cdef Prepared _take(self, object key)
    cdef bint _is_plain(self, Node node)
    cdef _read_next(self)
    cdef int _open(self, Real parent, bytes name, int flags)
    cdef int _slot_for(self, object key)
    cdef bint _queue(self, int number, object key, int fd, bytes wanted) except -1
    cdef void _fill(self, slot* one) noexcept nogil
    cdef bint _list(self, slot* one) noexcept nogil
    cdef bint _look_at(self, slot* one, const char* name) noexcept nogil
