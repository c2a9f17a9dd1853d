from libc.stdint cimport uint32_t

from overlayfs_py.engines.native.session cimport Request, Session


cdef object maker(Session s, Request r, uint32_t umask)
cdef tuple labels(const char* at, size_t size)
