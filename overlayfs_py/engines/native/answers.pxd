from libc.stdint cimport uint32_t, uint64_t

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport Request, Session

cdef void put_stat(protocol.attr_t* out, Node node, stat_t* st)
cdef void put_statx(protocol.statx_t* out, protocol.attr_t* shown)
cdef object get_time(uint64_t seconds, uint32_t rest)
cdef object decode_device(uint32_t device)
cdef Py_ssize_t put_entry_at(Session s, protocol.entry_out* out, Node node, object st) except -2
cdef Py_ssize_t put_plain_entry(Session s, protocol.entry_out* out, Node node, stat_t* st) except -2
cdef Py_ssize_t put_entry(Session s, Request r, Node node) except -2
cdef Py_ssize_t put_found(Session s, Request r, Node node, object st) except -2
cdef Py_ssize_t put_known(Session s, Request r, Node node, stat_t* st) except -2
cdef Py_ssize_t put_absent(Session s, protocol.entry_out* out) except -2
cdef void put_attr(protocol.attr_t* out, object shown)
cdef void put_validity(Session s, uint64_t node_id, protocol.attr_out* out)
cdef Py_ssize_t put_attr_out(Session s, Request r, object shown) except -2
cdef Py_ssize_t put_bytes(Request r, bytes value) except -2
cdef Py_ssize_t put_sized(Request r, uint32_t wanted, bytes value) except -2
cdef Py_ssize_t put_size(Request r, size_t size) except -2
