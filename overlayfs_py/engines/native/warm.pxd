from libc.stdint cimport int64_t

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native.plain cimport Plain

cdef enum:
    # Nanoseconds that a read from the page cache doesn't take.
    LONG = 60_000


cdef class Place:
    cdef Node parent
    # The files of a directory in its order, and the first that has not been looked at.
    cdef list order
    cdef Py_ssize_t next
    # How many of them the disk has been asked for and nobody has read.
    cdef int asked


cdef class Warm:
    cdef Plain plain
    # The directory that was taken up last.
    cdef Place last
    # The files asked for, each with its place, the one asked for first at the beginning.
    cdef dict asked
    # Descriptors of files that the disk is to be asked for.
    cdef list opened
    cdef Node expected
    cdef int hits
    cdef int window
    cdef int cached

    cdef inline bint is_long(self, int64_t nanoseconds):
        """Whether a read that took so long has waited for a disk."""
        return nanoseconds > LONG

    cdef begin(self, Node parent)
    cdef bint visit(self, Node node) except -1
    cdef waited(self, Node node)
    cdef list take(self)
    cdef Place _place(self, Node parent)
    cdef _choose(self, Place place)
    cdef bint _open(self, Node node) except -1
    cdef _miss(self)
