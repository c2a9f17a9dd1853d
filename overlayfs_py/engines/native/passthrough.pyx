# cython: language_level=3, annotation_typing=False
"""Backing files: open files that the kernel reads, writes and maps without asking (FUSE_PASSTHROUGH, Linux 6.9).

A file is passed through where its data stays what it is: in the upper layer, or in any layer of a mount without one. A
file that a write would copy up is served by this engine, or a handle opened before would go on showing the old data.

The kernel wants all handles of a file that it passes through to have one backing file, and none beside them that it
caches pages for (fs/fuse/iomode.c). So the first handle decides for all that are open at the same time. Handles are
counted here until RELEASE, which the kernel sends after it has stopped counting them.
"""

import errno
import os

from libc.errno cimport errno as c_errno
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport write

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol

from overlayfs_py.errors import MountError
from overlayfs_py.journal import Journal

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, void* argument)

log = Journal(__name__)

cdef uint32_t ACCESS_MODE = os.O_ACCMODE

cdef unsigned long BACKING_OPEN = 0x4010E501
cdef unsigned long BACKING_CLOSE = 0x4004E502

# struct fuse_backing_map
cdef struct backing_map:
    int32_t fd
    uint32_t flags
    uint64_t padding

# struct fuse_notify_inval_inode_out, behind its header
cdef struct inval_inode:
    protocol.out_header head
    uint64_t ino
    int64_t off
    int64_t len


cdef class _Opened:
    """The handles of one node: all of them cached, or all passed through to one backing file."""

    cdef int handles
    # 0: cached
    cdef int backing_id


cdef class Passthrough:
    """The open files of a mount whose kernel does ask for opening. All but forget() of data is called with the session's
    lock held."""

    def __init__(self, fs, fuse_fd):
        self.fs = fs
        self.fuse_fd = fuse_fd
        self.opened = {}
        self.writing = {}

    def check(self):
        """See that this process may register backing files; raises MountError."""
        cdef backing_map asked
        memset(&asked, 0, sizeof(asked))
        asked.fd = -1
        if not self.on:
            raise MountError("the kernel has no FUSE passthrough (Linux 6.9 has it); use io=cached")
        if ioctl(self.fuse_fd, BACKING_OPEN, &asked) < 0 and c_errno == errno.EPERM:
            raise MountError("io=passthrough needs CAP_SYS_ADMIN outside of any user namespace; use io=cached")

    cdef uint64_t open(self, Node node, uint32_t flags, int32_t* backing_id) except 0:
        """Count a handle for the flags of open(2), once what they ask for is copied up; `backing_id` is 0 if cached."""
        cdef _Opened opened = self.opened.get(node.id)
        cdef uint64_t handle
        if opened is None:
            opened = _Opened()
            if not self._may_change(node):
                opened.backing_id = self._register(node)
            self.opened[node.id] = opened
        opened.handles += 1
        backing_id[0] = opened.backing_id
        if opened.backing_id == 0:
            return CACHED
        handle = THROUGH
        if flags & ACCESS_MODE:
            handle |= WRITING
            self._will_write(node.id)
        return handle

    cdef uint64_t open_cached(self, Node node):
        """Count a handle that the kernel takes for opened without having asked."""
        cdef _Opened opened = self.opened.setdefault(node.id, _Opened())
        opened.handles += 1
        return CACHED

    cdef bint release(self, uint64_t node_id, uint64_t handle) except -1:
        """The last descriptor of a handle is closed; False where no handle is open, for which the kernel doesn't ask."""
        cdef _Opened opened = self.opened.get(node_id)
        cdef uint32_t backing_id
        if opened is None:
            return False
        opened.handles -= 1
        if opened.handles == 0:
            del self.opened[node_id]
            if opened.backing_id:
                backing_id = opened.backing_id
                ioctl(self.fuse_fd, BACKING_CLOSE, &backing_id)
        if handle & WRITING and node_id in self.writing:
            if self.writing[node_id] == 1:
                del self.writing[node_id]
            else:
                self.writing[node_id] -= 1
        return True

    cdef bint grows_old(self, uint64_t node_id):
        """Whether the kernel is to ask for a node's attributes each time."""
        return self.writing and node_id in self.writing

    cdef bint _may_change(self, Node node):
        """Whether a node's data may come to be another file's."""
        if self.fs.upper is None:
            # With a timeout, layers are to be looked at again.
            return self.fs.config.timeout != float("inf")
        return (node.upper is None and node.pinned < 0) or node.metacopy

    cdef int _register(self, Node node):
        """The kernel's number for a node's data as a backing file; 0 where it takes none."""
        cdef backing_map asked
        cdef int number
        backing = self.fs.files.held(node, write=False)
        memset(&asked, 0, sizeof(asked))
        asked.fd = backing.fd
        number = ioctl(self.fuse_fd, BACKING_OPEN, &asked)
        if number > 0:
            return number
        # ELOOP: the layer's filesystem stands on others itself.
        if not self.warned:
            self.warned = True
            log.warning("a file can't be passed through (%s): it is served as with io=cached", os.strerror(c_errno))
        return 0

    cdef _will_write(self, uint64_t node_id):
        """Have the kernel ask for a node's attributes from now on: a mapping that is written tells it nothing."""
        self.writing[node_id] = self.writing.get(node_id, 0) + 1
        self.forget(node_id, ATTRIBUTES_ALONE)

    cdef forget(self, uint64_t node_id, int64_t offset):
        """Have the kernel forget a node's attributes, and its data from an offset on, unless that is ATTRIBUTES_ALONE.

        It sends what was changed through mappings first, and waits until that has been served.
        """
        cdef inval_inode message
        cdef Py_ssize_t sent
        memset(&message, 0, sizeof(message))
        message.head.len = sizeof(message)
        message.head.error = protocol.NOTIFY_INVAL_INODE
        message.ino = node_id
        message.off = offset
        with nogil:
            sent = write(self.fuse_fd, &message, sizeof(message))
        if sent < 0 and c_errno not in (errno.ENOENT, errno.ENODEV):
            # ENOENT: the kernel has just made the file and knows nothing of it yet; ENODEV: unmounted
            log.error("the kernel can't be told to forget what has changed: %s", os.strerror(c_errno))
