# The types of nodes.py, for the compiled build. Everything is public, as the modules beside it may run uncompiled.

cdef class Real:
    cdef public object layer
    cdef public Real parent
    cdef public bytes name

    cpdef bytes path(self)


cdef class Node:
    # In this order for its size: a mount may have millions of them.
    cdef public object id
    cdef public Node parent
    cdef public bytes name
    cdef public Real upper
    # None, a Real, or a tuple of several.
    cdef public object below
    cdef public dict children
    cdef public dict aliases
    cdef public bytes redirect
    cdef public unsigned long long upper_ino
    cdef public long lookups
    cdef public int opens
    cdef public int nlink
    cdef public int pinned
    cdef public unsigned int generation
    cdef public unsigned short kind
    cdef public unsigned char protection
    # Yes or no.
    cdef public unsigned char removed
    cdef public unsigned char indexed
    cdef public unsigned char metacopy
    cdef public unsigned char markless

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
