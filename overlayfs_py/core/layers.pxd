# The types of layers.py, for the compiled build. Everything is public, as the modules beside it may run uncompiled.

from overlayfs_py.core.nodes cimport Real


cdef class Layer:
    cdef public int fd
    cdef public int index
    cdef public bint data_only
    cdef public bint xattr_whiteouts
    cdef public unsigned long long dev
    cdef public object inode_of
    cdef public object override
    cdef public object path
    cdef public Real root
    cdef public object uuid


cdef class Numbers:
    cdef public dict filesystems
    cdef public int bits
    cdef public int shift
    cdef public unsigned long long low
    cdef public unsigned long long last_dev
    cdef public unsigned long long last_base

    cpdef unsigned long long number(self, unsigned long long dev, unsigned long long inode) except? 0
    cpdef split(self, number)
    cdef _mix(self, place, inode)


cdef class DirCache:
    cdef public dict fds
    cdef public int limit
    cdef public Real last
    cdef public int last_fd
    cdef public int holders
    cdef public list late

    cpdef int fd(self, Real real) except? -1
    cdef int _open(self, Real real) except? -1
    cpdef hold(self)
    cpdef let_go(self)
    cdef _close(self, int fd)
    cpdef drop(self, Real real)
    cpdef close(self)
