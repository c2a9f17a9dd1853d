from libc.stdint cimport uint32_t, uint64_t

from overlayfs_py.core.nodes cimport Node


cdef class Generations:
    cdef object fs
    cdef object dirs
    # Whether the kernel is to open file handles at all.
    cdef bint wanted
    # Of what has no generation on disk; never nought, and different in each mount.
    cdef uint64_t own

    cdef uint64_t of(self, Node node) except? -1
    cdef uint32_t _on_disk(self, Node node) except? 0
