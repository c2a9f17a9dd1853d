from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native.session cimport Request, Session

cdef take_set_ids(Session s, Request r, Node node)
