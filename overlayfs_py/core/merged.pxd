# The types of merged.py, for the compiled build. Everything is public, as the modules beside it may run uncompiled.

from overlayfs_py.core.nodes cimport Node


cdef class MergedNames:
    cdef public object fs
    cdef public dict by_node
    cdef public Py_ssize_t count
    cdef public bint enabled
    cdef public Node last
    cdef public dict last_masks
    cdef public dict patience

    cpdef object mask(self, Node parent, bytes name)
    cpdef missed(self, Node parent)
    cdef object _list(self, Node parent)
    cpdef learn(self, Node parent, dict masks)
    cpdef drop(self, Node parent)
