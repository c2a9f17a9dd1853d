# cython: language_level=3, annotation_typing=False
"""Keeping the number of nodes within a bound: the kernel is asked to forget some (FUSE_NOTIFY_PRUNE, Linux 6.18).

It drops the names of each that nobody holds, and forgets what has none left; what is open, or a directory with names
below it, stays. Asked for are those that were looked up longest ago, or asked for longest ago: the table of nodes is a
dict, in the order of insertion, and what has had its turn goes to its end.
"""

import errno
import os
import time
from itertools import islice

from libc.errno cimport errno as c_errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.unistd cimport write

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol

from overlayfs_py.journal import Journal

log = Journal(__name__)

_LEAST = 64
_MOST = 4096
_PAUSE = 0.001  # seconds
_PAUSES = 50
_SCANNED = 4  # nodes looked at for each that is asked for

# struct fuse_notify_prune_out, behind its header; the nodes follow.
cdef struct prune:
    protocol.out_header head
    uint32_t count
    uint32_t padding
    uint64_t spare


cdef class Pruning:
    """The bound of one mount."""

    def __init__(self, fs, fuse_fd, workers):
        self.by_id = fs.nodes.by_id
        self.fuse_fd = fuse_fd
        self.workers = workers
        self.limit = fs.config.max_nodes

    def check(self, minor):
        """See whether the kernel can be asked, as of protocol 7.45; a bound that can't be kept is none."""
        if self.limit and minor < 45:
            log.warning("option max_nodes has no effect before Linux 6.18, which forgets on request; ignored")
            self.limit = 0

    cdef look(self):
        """Ask the kernel to forget some nodes where there are too many; with the session's lock held."""
        if self.under_way or <Py_ssize_t>len(self.by_id) <= self.limit:
            return
        nodes = self._oldest()
        if nodes:
            self.under_way = True
            # In another thread, without the lock: the kernel may wait for writes that are under way here.
            try:
                self.workers().submit(self._ask, nodes)
            except OSError:
                # no thread to be had: the next look-up tries again
                self.under_way = False

    cdef hold_back(self):
        """Wait a little where nodes come faster than the kernel is asked to forget them; without the session's lock."""
        cdef int pause
        for pause in range(_PAUSES):
            if not self.under_way or <Py_ssize_t>len(self.by_id) <= self.limit + self.limit // 2:
                return
            # No more than so often: the kernel may wait, in turn, for what is held back here.
            time.sleep(_PAUSE)

    cdef list _oldest(self):
        cdef Node node
        # All that are too many: where this thread got little time, more have come than it asked for last.
        cdef Py_ssize_t wanted = min(max(<Py_ssize_t>len(self.by_id) - self.limit, self.limit // 8, _LEAST), _MOST)
        found = []
        for node in list(islice(self.by_id.values(), wanted * _SCANNED)):
            del self.by_id[node.id]
            self.by_id[node.id] = node
            if node.lookups > 0 and not node.opens and not node.children and node.parent is not None:
                found.append(node.id)
                if len(found) == wanted:
                    break
        return found

    def _ask(self, nodes):
        try:
            self._send(nodes)
        finally:
            self.under_way = False

    cdef _send(self, list nodes):
        cdef size_t count = len(nodes)
        cdef size_t size = sizeof(prune) + count * sizeof(uint64_t)
        cdef prune* message = <prune*>malloc(size)
        cdef uint64_t* ids = <uint64_t*>(message + 1)
        cdef size_t index
        cdef Py_ssize_t sent
        if message is NULL:
            raise MemoryError()
        memset(message, 0, sizeof(prune))
        message.head.len = <uint32_t>size
        message.head.error = protocol.NOTIFY_PRUNE
        message.count = <uint32_t>count
        for index in range(count):
            ids[index] = nodes[index]
        with nogil:
            sent = write(self.fuse_fd, message, size)
        if sent < 0 and c_errno != errno.ENODEV:
            log.error("the kernel can't be asked to forget: %s", os.strerror(c_errno))
        free(message)
