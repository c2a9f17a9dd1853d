# cython: language_level=3, annotation_typing=False
"""Generations: what tells a file handle of the mount that its node id has become another object's.

The kernel makes file handles of node id and generation, and holds on to an inode only while its generation stays. A
node id is an inode number, which a filesystem gives anew once its object is removed. So the generation is taken from
where the number is: an object of the upper layer has the checksum of its own file handle there, which holds the
filesystem's generation of it. Lower layers don't change: what has its number there, copied up or not, has the
generation 0, which costs nothing.
"""

import os

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from overlayfs_py.core.nodes cimport Node, Real

cdef extern from "<fcntl.h>" nogil:
    int AT_EMPTY_PATH
    int name_to_handle_at(int dir_fd, const char* path, void* handle, int* mount_id, int flags)

cdef enum:
    MAX_HANDLE = 128  # bytes, MAX_HANDLE_SZ

# Odd, and its powers far apart.
cdef uint32_t FACTOR = 0x9E3779B1

# struct file_handle
cdef struct file_handle:
    uint32_t handle_bytes
    int handle_type
    unsigned char f_handle[MAX_HANDLE]


cdef class Generations:
    """The generations of one overlay's nodes. All is called with the session's lock held."""

    def __init__(self, fs):
        self.fs = fs
        self.dirs = fs.dirs
        self.wanted = fs.config.nfs_export is not False
        self.own = int.from_bytes(os.urandom(4), "little") | 1

    cdef uint64_t of(self, Node node) except? -1:
        """A node's generation, the same for as long as the kernel refers to it; 32 bits."""
        if not self.wanted or node.parent is None:
            return 0
        if node.generation:
            return node.generation
        if node.upper is not None and <uint64_t>node.id == node.upper_ino:
            # As the number below, in most mounts.
            node.generation = self._on_disk(node)
        elif node.id > self.fs.nodes.fresh:
            # Another mount may give this number to something else.
            node.generation = <uint32_t>self.own
        elif node.upper is None:
            return 0
        elif node.id == self.fs.numbers.number(node.upper.layer.dev, node.upper_ino):
            node.generation = self._on_disk(node)
        return node.generation

    cdef uint32_t _on_disk(self, Node node) except? 0:
        """The checksum of a real object's handle, never nought; where it has none, a number that nothing else gets."""
        cdef file_handle handle
        cdef int mount_id
        cdef int result
        cdef Real real = node.upper
        handle.handle_bytes = MAX_HANDLE
        if node.pinned >= 0:
            result = name_to_handle_at(node.pinned, b"", &handle, &mount_id, AT_EMPTY_PATH)
        else:
            result = name_to_handle_at(self.dirs.fd(real.parent), real.name, &handle, &mount_id, 0)
        if result == 0:
            return checksum(handle.f_handle, handle.handle_bytes)
        self.own = <uint32_t>(self.own + 2)
        return <uint32_t>self.own


cdef uint32_t checksum(const unsigned char* handle, size_t length) noexcept:
    """Another number, never nought, for each of the handles that differ in one word of 32 bits, as a generation is one.

    Multiplying by an odd number loses nothing of a word.
    """
    cdef uint32_t word
    cdef uint32_t total = 0
    cdef uint32_t factor = 1
    cdef size_t at = 0
    while at < length:
        word = 0
        memcpy(&word, handle + at, min(sizeof(word), length - at))
        total ^= word * factor
        factor *= FACTOR
        at += sizeof(word)
    return total if total != 0 else 1
