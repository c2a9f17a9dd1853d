# The types of nodes.py, for the compiled build. Everything is public, as the modules beside it may run uncompiled.

cdef class Real:
    cdef public object layer
    cdef public Real parent
    cdef public bytes name

    cpdef bytes path(self)


cdef class Node:
    cdef public object id
    cdef public unsigned int kind
    cdef public Node parent
    cdef public bytes name
    cdef public Real upper
    cdef public tuple lowers
    cdef public dict children
    cdef public dict aliases
    cdef public long lookups
    cdef public long opens
    cdef public int pinned
    cdef public bint removed
    cdef public bytes redirect
    cdef public bint indexed
    cdef public long nlink
    cdef public object upper_ino
    cdef public bint metacopy

    cpdef list names(self)
    cpdef bint has_other_name(self, Node parent, bytes name)
    cpdef add_name(self, Node parent, bytes name)
    cpdef drop_name(self, Node parent, bytes name)


cdef class NodeTable:
    cdef public dict by_id
    cdef public object fresh
    cdef public object limit

    cpdef add(self, Node node, object number)
    cpdef discard(self, Node node)
