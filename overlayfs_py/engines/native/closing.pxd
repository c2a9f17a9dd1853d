from overlayfs_py.engines.native.background cimport Background

cdef enum:
    # Descriptors that wait to be closed, at most.
    ROOM = 32


cdef class Closing(Background):
    cdef int descriptors[ROOM]
    cdef int count
